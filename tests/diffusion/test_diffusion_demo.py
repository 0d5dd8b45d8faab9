"""The demo of generators, with a few steps of everything: it trains, exports, measures and draws, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion import demo

FEW = {"steps": 20, "run.progress": False, "run.evaluate_every": None, "run.proof_window": 2, "run.log_every": 10}


@pytest.mark.slow
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "PAIRS", 64)
    monkeypatch.setattr(demo, "MEASURED", 40)
    reports = demo.run_demo(tmp_path, changes=FEW)
    assert list(reports) == ["teacher, 18 steps", "student, 1 step", "student, 2 steps", "student, 4 steps"]
    for report, steps in zip(reports.values(), (18, 1, 2, 4), strict=True):
        assert (report.count, report.steps) == (40, steps)
        assert 0 <= report.samples["class_accuracy"] <= 1
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    for run in ("teacher", "student"):
        assert (tmp_path / run / "export" / "model_index.json").is_file()
    written = (tmp_path / "student" / "checkpoints").stat().st_mtime_ns
    again = demo.run_demo(tmp_path, changes=FEW)
    assert again["student, 1 step"].samples == reports["student, 1 step"].samples
    assert (tmp_path / "student" / "checkpoints").stat().st_mtime_ns == written
