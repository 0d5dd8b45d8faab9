"""On a CUDA device: resumed runs, inductor's graphs, half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Job, assert_continues, continued, curves_apart, play, uninterrupted
from miniatures import MINIATURES

STOP = 7
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_device(job: Job, **settings: object) -> Job:
    return replace(job, settings=job.settings | {"device": "cuda"} | settings)


@pytest.mark.parametrize("name", MINIATURES)
def test_resume_in_mid_cycle(name: str, tmp_path: Path) -> None:
    """Without `deterministic`, cuDNN's convolutions add in any order."""
    whole = play(on_device(uninterrupted(name, STOP), deterministic=True), tmp_path)
    torch.manual_seed(99)
    assert_continues(whole, play(on_device(continued(name, STOP, tmp_path), deterministic=True), tmp_path), STOP)


@pytest.mark.parametrize("name", ["hint", "adversarial"])
def test_inductor_trains_as_eager_does(name: str, tmp_path: Path) -> None:
    eager, compiled = (
        play(on_device(Job(f"{compiled}", name, steps=8), compile=compiled), tmp_path) for compiled in (False, True)
    )
    assert curves_apart(eager, compiled) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: str, tmp_path: Path) -> None:
    outcome = play(on_device(Job(precision, "bank"), mixed_precision=precision), tmp_path)
    assert (outcome.reason, outcome.error) == ("finished", "")
