"""What the mechanisms share: paired tables, and the pair with its teacher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from visiondistill.engine.errors import SettingsError
from visiondistill.mechanisms import pair, tables

OURS = {0: {"accuracy": 0.50}, 1: {"accuracy": 0.54}, 2: {"accuracy": 0.52}}
OTHERS = {0: {"accuracy": 0.49}, 1: {"accuracy": 0.51}}


def test_differences_are_of_the_seeds_that_both_have() -> None:
    # Differences 1 and 3: mean 2, standard error 1, t(0.975, 1) = 12.706.
    assert tables.minus(OURS, OTHERS, "accuracy", 100) == "+2.00 ± 12.71"
    assert tables.minus(OURS, {2: OTHERS[0]}, "accuracy", 100) == "+3.00"
    assert tables.minus(OURS, {}, "accuracy") == "-"


def test_means_have_their_standard_deviation() -> None:
    assert tables.spread(OURS, "accuracy", 100) == "52.00 ± 2.00"
    assert tables.spread({0: OURS[0]}, "accuracy", digits=1) == "0.5"
    assert tables.spread(OURS, "alpha") == "-"
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_only_finished_runs_count(tmp_path: Path) -> None:
    for seed in (0, 2):
        (tmp_path / f"kd_{seed}").mkdir()
    (tmp_path / "kd_2" / "result.json").write_text(json.dumps(OURS[2]))
    assert tables.finished(tmp_path, "kd", range(3)) == {2: OURS[2]}


def test_one_process_can_have_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["x", "--data", "d", "--arms", "b"]
    monkeypatch.setattr(sys, "argv", [*words, "--only-seed", "4"])
    given = pair.arguments("about", ["a", "b"], ["a"], "runs/x")
    assert (given.arms, given.seeds, given.only_seed) == (["b"], [4], 4)
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "2"])
    given = pair.arguments("about", ["a", "b"], ["a"], "runs/x")
    assert (list(given.seeds), given.only_seed) == ([0, 1], None)


def test_a_teacher_is_trained_where_its_weights_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[dict] = []
    monkeypatch.setattr(pair.workbench, "run", ran.append)
    weights = tmp_path / "run" / "export" / "model.safetensors"
    pair.taught("images", weights)
    (config,) = ran
    assert config["run"]["output_dir"] == str(tmp_path / "run"), "whose export is the file"
    assert config["data"]["init_args"]["root"] == "images"
    weights.parent.mkdir(parents=True)
    weights.touch()
    pair.taught("images", weights)
    assert len(ran) == 1
    with pytest.raises(SettingsError, match="RUN/export/model"):
        pair.taught("images", tmp_path / "other.pt")
