"""A run continued in mid-cycle is the uninterrupted run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Job, assert_continues, continued, play, uninterrupted
from miniatures import MINIATURES

STOP = 7
"""In the middle of every cycle, and in the second stage of three."""


@pytest.mark.parametrize("name", MINIATURES)
def test_resume_in_mid_cycle(name: str, tmp_path: Path) -> None:
    whole = play(uninterrupted(name, STOP), tmp_path)
    torch.manual_seed(99)
    assert_continues(whole, play(continued(name, STOP, tmp_path), tmp_path), STOP)


@pytest.mark.parametrize("name", ["stages", "batch_norm_stages"])
@pytest.mark.parametrize("stop", [3, 6, 7, 12, 14, 19])
def test_resume_anywhere_in_three_stages(name: str, stop: int, tmp_path: Path) -> None:
    """Stages of 6, 6 and 8 steps; a signal ends the run at `stop`, or the stage's own end does."""
    whole = play(Job("whole", name), tmp_path)
    cut = play(Job("cut", name, signal_at=stop - 1), tmp_path)
    assert cut.reason == "SIGTERM"
    assert max(step for step, _ in cut.curve) == stop
    # A player of a stage that has not begun is in no checkpoint: it is the constructor's.
    weights = 7 if stop > 6 else 0
    assert_continues(whole, play(Job("cut", name, weights=weights, settings={"resume": "auto"}), tmp_path), stop)


def test_a_continued_run_can_be_continued_elsewhere(tmp_path: Path) -> None:
    """Each time in a new folder: what earlier stages made must travel along."""
    whole = play(Job("whole", "stages"), tmp_path)
    play(Job("first", "stages", signal_at=7), tmp_path)
    play(Job("second", "stages", weights=7, settings={"resume": str(tmp_path / "first")}, signal_at=13), tmp_path)
    third = Job("third", "stages", weights=8, settings={"resume": str(tmp_path / "second")})
    assert_continues(whole, play(third, tmp_path), 14)
