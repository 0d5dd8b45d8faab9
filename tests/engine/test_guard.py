"""A value that is not finite: nothing moves from it, the run ends naming it, and a bundle replays it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import POISONED_TERM, Job, assert_same, override, play, poisoned, state, train_stages
from miniatures import MINIATURES

from visiondistill.engine import Batch, Carry, Draw, Method, Terms
from visiondistill.engine.ema import Ema
from visiondistill.engine.replay import replay

POISON = 7
"""The eighth step, of an even number and no multiple of five."""


def good(name: str) -> Job:
    """Ends by a signal after the last good step."""
    return Job(f"{name}-good", name, signal_at=POISON - 1)


@pytest.fixture
def averages(monkeypatch: pytest.MonkeyPatch) -> list[Ema]:
    """Every moving average that is made: a run that fails returns none."""
    made: list[Ema] = []
    start = Ema.__init__

    def note(self: Ema, *args: object, **settings: object) -> None:
        start(self, *args, **settings)
        made.append(self)

    monkeypatch.setattr(Ema, "__init__", note)
    return made


@pytest.mark.parametrize("log_every", [1, 5, 50])
@pytest.mark.parametrize("name", POISONED_TERM)
def test_nothing_moves_from_a_poisoned_batch(name: str, log_every: int, averages: list[Ema], tmp_path: Path) -> None:
    """Neither in its step nor, with the guard read later only, in those that follow."""
    before = play(good(name), tmp_path)
    after = play(poisoned(name, POISON, log_every), tmp_path)
    assert_same(after.weights, before.weights)
    first, second = (state(average.module()) for average in averages)
    assert_same(second, first)


@pytest.mark.parametrize("name", POISONED_TERM)
def test_the_error_names_step_turn_term_and_input(name: str, tmp_path: Path) -> None:
    error = play(poisoned(name, POISON), tmp_path).error
    turn, term = POISONED_TERM[name]
    assert error.startswith("NonFinite: ")
    for part in (f"step {POISON} ", turn, f"'{term}'"):
        assert part in error, error


def test_the_error_ends_with_what_can_be_done_and_names_a_few_tensors(tmp_path: Path) -> None:
    *causes, replays, cure = play(poisoned("hint", POISON), tmp_path).error.splitlines()
    assert "workbench.replay" in replays
    assert cure.startswith("Lower optim.*.lr")
    (gradients,) = (line for line in causes if "players.student." in line)
    assert gradients.count("players.student.") == 3
    assert gradients.endswith(" more")


@pytest.mark.parametrize("name", ["hint", "batch_norm"])
def test_a_bundle_is_written_and_no_checkpoint(name: str, tmp_path: Path) -> None:
    job = poisoned(name, POISON, 50)
    outcome = play(job, tmp_path)
    folder = tmp_path / job.name
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000000005"]
    bundles = list((folder / "replay").iterdir())
    assert len(bundles) == 1
    fresh = MINIATURES[name](3, 20)[0][0].method
    found = replay(fresh, bundles[0])
    assert POISONED_TERM[name][1] in found["not_finite"]
    players = {key: value for key, value in state(fresh).items() if ".players." in key}
    assert_same(players, {key: outcome.weights[key] for key in players})


def test_a_gradient_that_is_not_finite_is_caught_and_named(tmp_path: Path) -> None:
    stages, settings = MINIATURES["mutual"](0, 20)
    kind = type(stages[0].method)

    def prepare(self: Method, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch | {"due": torch.tensor(float(draw.step == POISON), dtype=torch.float64)}

    def loss(self: Method, batch: Batch) -> tuple[Terms, Carry]:
        terms, carry = kind.loss(self, batch)
        bias = self.players["left"].head.bias
        # At 0 the square root is finite and its slope is not.
        return terms | {"left/slope": ((bias - bias.detach()).square().sum() + 1 - batch["due"]).sqrt()}, carry

    override(stages[0].method, prepare=prepare, loss=loss)
    clean = play(good("mutual"), tmp_path)
    outcome = train_stages(stages, settings, tmp_path / "slope")
    assert_same(outcome.weights, clean.weights)
    assert f"step {POISON} " in outcome.error
    assert "both: players.left.head.bias" in outcome.error
