"""The measurement of what hard augmentations transfer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from visiondistill import recipes
from visiondistill.augmentors import AffineRange
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
    assert "| 25.0 ± 0.0 |" in lines[3]
