"""The measurement of what hard augmentations transfer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from visiondistill import recipes
from visiondistill.augmentors import AffineRange
from visiondistill.engine import Result
from visiondistill.mechanisms import hard


def test_coverage_is_the_share_of_places_that_get_enough() -> None:
    edit = AffineRange(0, hard.MARGIN / hard.CANVAS, 1, 0)
    assert hard.covered(hard.places(edit, 0)) == pytest.approx(1 / 169)
    with torch.no_grad():
        edit.width.fill_(20.0)
    everywhere = hard.places(edit, 0)
    assert everywhere.sum() == 2000
    assert hard.covered(everywhere) > 0.95
    with torch.no_grad():
        edit.width[2] = 0.0
    assert hard.places(edit, 0)[hard.MARGIN].sum() == 2000, "to the sides, in the middle row"
    assert hard.covered(hard.places(edit, 0)) == pytest.approx(13 / 169)


def test_it_measures_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = recipes.load

    def short(name: str) -> recipes.Config:
        return recipes.override(load(name), {"stages.teacher.steps": 20, "stages.student.steps": 40})

    monkeypatch.setattr(recipes, "load", short)
    teacher = hard.taught(tmp_path)
    weights = [p.clone() for p in teacher.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(hard.taught(tmp_path).parameters(), weights, strict=True))
    for arm in ("shift", "range"):
        found = hard.measured(arm, 0, teacher, tmp_path)
        assert {"centred", "shifted"} <= set(found)
        assert ("covered_in_all" in found) == (arm == "range")
    assert (tmp_path / "range_0" / "edits.png").stat().st_size > 1000
    (tmp_path / "range_0" / "result.json").write_text(json.dumps(found | {"shifted": 0.25}))
    assert hard.measured("range", 0, teacher, tmp_path)["shifted"] == 0.25
    lines = hard.table(tmp_path, ["shift", "range"], 1).splitlines()
    assert lines[2].startswith("| shift | ")
    assert lines[2].endswith("| - | - |")
    assert "| 25.0 |" in lines[3]


def test_a_run_that_a_signal_ended_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = hard.train

    def cut(*given: Any, **named: Any) -> Result:
        result = train(*given, **named)
        result.reason = "SIGTERM"
        return result

    load = recipes.load
    short = {"stages.teacher.steps": 6, "stages.student.steps": 6, "run.proof_window": 2}
    monkeypatch.setattr(recipes, "load", lambda name: recipes.override(load(name), short))
    monkeypatch.setattr(hard, "train", cut)
    with pytest.raises(KeyboardInterrupt, match=r"SIGTERM in .*teacher"):
        hard.taught(tmp_path)
    assert not (tmp_path / "teacher.pt").exists()
    monkeypatch.setattr(hard, "train", train)
    teacher = hard.taught(tmp_path / "again")
    monkeypatch.setattr(hard, "train", cut)
    with pytest.raises(KeyboardInterrupt, match=r"SIGTERM in .*none_0"):
        hard.measured("none", 0, teacher, tmp_path)
    assert not (tmp_path / "none_0" / "result.json").exists()
    assert len(hard.table(tmp_path, ["none"], 1).splitlines()) == 3


def test_the_sparing_control_shifts_half_of_the_images() -> None:
    shift, half = (recipes.load(f"measured/hard_{arm}") for arm in ("shift", "half"))
    ours, theirs = (plan["stages"]["student"]["method"]["init_args"].pop("augmentor") for plan in (half, shift))
    assert ours["init_args"] == theirs["init_args"] | {"shift_probability": 0.5}
    assert half["stages"] == shift["stages"]
