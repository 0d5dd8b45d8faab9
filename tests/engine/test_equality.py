"""The same training, however the batch is cut into micro-batches (float64); `test_two_processes.py` has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Job, Outcome, apart, curves_apart, play
from miniatures import MINIATURES, SPLITTABLE

TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=SPLITTABLE)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outcome]:
    """A miniature with the batch in one piece."""
    return request.param, play(Job("whole", request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_train_alike(whole: tuple[str, Outcome], micro: int, tmp_path: Path) -> None:
    name, expected = whole
    found = play(Job("split", name, settings={"grad_accum_steps": micro}), tmp_path)
    assert not found.error
    assert not expected.error
    assert apart(found.weights, expected.weights) < TOLERANCE
    assert apart(found.ema, expected.ema) < TOLERANCE
    assert curves_apart(found, expected) < TOLERANCE


def test_training_moved_exactly_the_trainable_parameters(whole: tuple[str, Outcome]) -> None:
    name, trained = whole
    assert {step for step, _ in trained.curve} == set(range(1, 21))
    method = MINIATURES[name](0, 20)[0][0].method
    before = dict(method.named_parameters())
    trainable = {key for key, parameter in before.items() if parameter.requires_grad}
    assert {key for key in before if not torch.equal(trained.weights[f"0.{key}"], before[key])} == trainable
