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


def test_moves_by_whole_pixels_are_those_of_the_ranges_rounded_with_their_gradient() -> None:
    sizes = {"turn": 0, "translation": (hard.MARGIN + 0.5) / hard.CANVAS, "scale": 1, "shear": 0, "start": 0.9}
    between, whole = AffineRange(**sizes), hard.WholePixels(**sizes)
    image = hard.glyphs(50).columns["image"]
    noise = between.noise(image, hard.Draw(0, 0, {"": (0, 50)}, 50, image.device), "test")
    pixels = between.moves.bounds[1:3] * hard.CANVAS
    expected = (between.numbers(image, noise, image)[:, 1:3] * pixels).round()
    assert expected.unique().tolist() == list(range(-hard.MARGIN, hard.MARGIN + 1))
    torch.testing.assert_close(whole.numbers(image, noise, image)[:, 1:3] * pixels, expected)
    for edit in (between, whole):
        edit.numbers(image, noise, image).square().sum().backward()
    assert whole.width.grad[1:3].abs().min() > 0
    moved, _ = whole(image, noise, image)
    down, right = expected[0].flip(0).int().tolist()
    inside = slice(hard.MARGIN, -hard.MARGIN)
    rolled = image[0].roll((down, right), (1, 2))
    torch.testing.assert_close(moved[0, :, inside, inside], rolled[:, inside, inside], atol=1e-4, rtol=0)


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
    assert set(found["covered"]) == {"40"}, "its only look is at the end"
    assert found["covered"]["40"] == found["covered_at_end"]


def test_coverage_is_told_by_step_for_arms_that_make_edits(tmp_path: Path) -> None:
    told = {"none_0": {}, "range_0": {"100": 0.1, "940": 0.5}, "range_1": {"100": 0.3, "940": 0.5}}
    for run, curve in told.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "result.json").write_text(json.dumps({"covered": curve} if curve else {"shifted": 0.1}))
    lines = hard.curves(tmp_path, ["none", "range"], 2).splitlines()
    assert lines[0] == "| arm | 100 | 940 |"
    assert lines[2:] == ["| range | 20.0 ± 14.1 | 50.0 ± 0.0 |"]


def test_the_arm_of_all_differs_in_share_start_and_warmup_alone() -> None:
    part, every = (
        recipes.load(f"measured/hard_{arm}")["stages"]["student"]["method"]["init_args"]["augmentor"]["init_args"]
        for arm in ("range", "all")
    )
    edit, wide = part.pop("edit")["init_args"], every.pop("edit")["init_args"]
    assert every == part | {"share": 1.0, "warmup": 0}
    assert wide == edit | {"start": 0.95}


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
