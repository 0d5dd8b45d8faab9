"""Looking at the product during a run: what is seen, and that the run is the same without."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import Outcome, assert_same, continued, train_stages
from miniatures import MINIATURES
from torch import nn

from visiondistill.engine import Watch


def run(name: str, folder: Path, watch: Watch | None, steps: int = 20, **settings: object) -> Outcome:
    stages, own = MINIATURES[name](0, steps)
    outcome = train_stages(stages, own | settings, folder, watch=watch)
    assert not outcome.error, outcome.error
    return outcome


def disturb(product: nn.Module, step: int) -> dict[str, float]:
    """The rudest look there is."""
    product.train().requires_grad_(True)
    with torch.enable_grad():
        sum(p.square().sum() for p in product.parameters()).backward()
    with torch.no_grad():
        for tensor in product.state_dict().values():
            tensor.zero_()
    torch.manual_seed(3)
    random.seed(3)
    torch.rand(5)
    return {"val/score": 1.0}


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_the_run_is_the_same_without_looking(name: str, tmp_path: Path) -> None:
    alone = run(name, tmp_path / "alone", None)
    watched = run(name, tmp_path / "watched", disturb, evaluate_every=3)
    assert_same(alone.weights, watched.weights)
    assert_same(alone.ema, watched.ema)
    assert alone.curve == {at: value for at, value in watched.curve.items() if at[1] != "val/score"}


def test_looks_come_when_they_are_due_and_at_the_end_of_each_stage(tmp_path: Path) -> None:
    told = []

    def watch(product: nn.Module, step: int) -> dict[str, float]:
        told.append(step)
        return disturb(product, step)

    outcome = run("stages", tmp_path, watch, evaluate_every=3, log_every=4)
    stages, _ = MINIATURES["stages"](0, 20)
    due, before = [], 0
    for stage in stages:
        due += [before + step for step in range(1, stage.steps + 1) if step % 3 == 0 or step == stage.steps]
        before += stage.steps
    assert [line["step"] for line in outcome.history if "val/score" in line] == told == due


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_averaged_weights_are_looked_at_where_there_are_such(decay: float | None, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watch(product: nn.Module, step: int) -> dict[str, float]:
        assert not any(part.training for part in product.modules())
        assert not torch.is_grad_enabled()
        seen.append({name: tensor.clone() for name, tensor in product.state_dict().items()})
        return {}

    outcome = run("hint", tmp_path, watch, evaluate_every=20, ema_decay=decay)
    assert len(seen) == 1
    if decay is None:
        final = {name.rpartition("players.student.")[2]: value for name, value in outcome.weights.items()}
    else:
        final = {name.removeprefix("0."): value for name, value in outcome.ema.items()}
    assert all(torch.equal(value, final[name]) for name, value in seen[0].items())


def test_no_look_without_a_period(tmp_path: Path) -> None:
    def watch(product: nn.Module, step: int) -> dict[str, float]:
        raise AssertionError("nobody asked for it")

    run("hint", tmp_path, watch)


def test_a_resumed_run_looks_at_the_same_steps(tmp_path: Path) -> None:
    run("hint", tmp_path / "hint-whole", disturb, evaluate_every=4, checkpoint_every=10, keep=5)
    whole = (tmp_path / "hint-whole" / "metrics.jsonl").read_text().count("val/score")
    settings = continued("hint", 10, tmp_path).settings
    again = run("hint", tmp_path / "again", disturb, evaluate_every=4, **settings)
    assert [line["step"] for line in again.history if "val/score" in line] == [12, 16, 20]
    assert whole == 5


def test_a_period_below_one_is_refused() -> None:
    from visiondistill.engine import Run

    with pytest.raises(ValueError, match="evaluate_every"):
        Run("runs/x", 4, evaluate_every=0)
