"""The measurement on Fashion-MNIST: its recipes for a few steps, on a few images in the layout of the real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion.mechanisms import one_step
from visiondistill import recipes, workbench

FEW = {"SAMPLES": 16, "PAIRS": 32, "TIMED": 8, "TEACHER_STEPS": (3, 1)}
SHORT = {"steps": 5, "run.batch_size": 8, "run.log_every": 1, "run.proof_window": 0}
TERMS = {"dmd2": {"dmd"}, "dmd2_gan": {"dmd", "gan"}, "dmd": {"dmd", "regression"}}


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the set; the recipes are short and narrow, what they say of the methods is left as it is."""
    raw, draw = tmp_path / "data" / "FashionMNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 20)):
        save(draw.integers(0, 256, (count, 28, 28)), raw / f"{split}-images-idx3-ubyte")
        save(np.arange(count) % 10, raw / f"{split}-labels-idx1-ubyte")
    whole = recipes.load

    def load(name: str) -> recipes.Config:
        small = {"student.block_out_channels": [4, 8], "student.norm_num_groups": 2, "student.steps": 3}
        return recipes.override(whole(name), SHORT | (small if name.endswith("teacher") else {}))

    monkeypatch.setattr(recipes, "load", load)
    for name, value in FEW.items():
        monkeypatch.setattr(one_step, name, value)
    return tmp_path


def save(values: np.ndarray, file: Path) -> None:
    """As the set's files are: a magic number that ends in the number of axes, their lengths, bytes."""
    head = np.array([0x0800 + values.ndim, *values.shape], ">u4")
    file.write_bytes(head.tobytes() + values.astype(np.uint8).tobytes())


def call(place: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    data, output = str(place / "data"), str(place / "runs")
    monkeypatch.setattr(sys, "argv", ["one_step", "--data", data, "--output", output, *words])
    one_step.main()


def test_runs_by_parts_make_one_table_and_nothing_is_done_twice(
    few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call(few, monkeypatch, "--arms", "dmd2", "--only-seed", "0")
    assert "|" not in capsys.readouterr().out, "a part makes no table"
    assert not (few / "runs" / "samples.png").exists()
    call(few, monkeypatch, "--seeds", "1")
    table = capsys.readouterr().out
    for arm in one_step.ARMS:
        lines = (few / "runs" / f"{arm}_0" / "metrics.jsonl").read_text()
        assert {name for name in ("dmd", "gan", "regression") if f'"student/{name}"' in lines} == TERMS[arm]
    head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    titles = ["real images", "teacher, 3 steps", "teacher, 1 step", *(f"{arm}, 1 step" for arm in one_step.ARMS)]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == titles
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert "-" not in {cell.strip() for row in rows[1:] for cell in row.split("|")}, "every figure is there"
    assert (few / "runs" / "samples.png").is_file()
    monkeypatch.setattr(workbench, "run", None)
    monkeypatch.setattr(one_step, "evaluate_generator", None)
    call(few, monkeypatch, "--arms", "dmd", "--only-seed", "0")


@pytest.mark.parametrize("images", one_step.IMAGES)
def test_the_arms_differ_by_one_term(images: str) -> None:
    plain = recipes.load(f"measured/{images}_dmd2")
    for arm, term in (("dmd2_gan", "gan"), ("dmd", "regression")):
        ours = recipes.load(f"measured/{images}_{arm}")
        ours["run"]["output_dir"] = plain["run"]["output_dir"]
        assert ours["method"]["init_args"].pop(term)
        ours["optim"].pop("discriminator", None)
        assert ours == plain
