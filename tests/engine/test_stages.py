"""Several stages under one run: what is kept, what begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import assert_same, override, train_stages
from miniatures import MINIATURES, built
from torch import Tensor, nn

from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Stage, Terms, Turn


class Fit(Method):
    """The same loss at every step, so that only the player, its optimiser and its average carry the past."""

    def __init__(self, player: nn.Module) -> None:
        super().__init__({"player": player})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("only", self.loss, moves=("player",)),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        x = torch.arange(12.0, dtype=torch.float64).view(4, 3)
        return {"fit": F.mse_loss(self.players["player"](x), x.sin())}, {}


def fit(lengths: tuple[int, ...], folder: Path, copies: bool = False, warmup: bool = False) -> dict[str, Tensor]:
    """Weights and average of the last of several stages, each with the player of the one before, or a copy of it."""

    def again(player: nn.Module) -> Fit:
        if not copies:
            return Fit(player)
        twin = nn.Linear(3, 3, dtype=torch.float64)
        twin.load_state_dict(player.state_dict())
        return Fit(twin)

    optim = {"player": Optim(lr=0.1)}
    first = Stage(Fit(built(0, lambda: nn.Linear(3, 3))), lengths[0], optim, name="0")
    later = [Stage(again, length, optim, name=str(place)) for place, length in enumerate(lengths[1:], 1)]
    outcome = train_stages([first, *later], {"batch_size": 4, "ema_decay": 0.9, "ema_warmup": warmup}, folder)
    assert not outcome.error
    last = f"{len(lengths) - 1}."
    return {name: value for name, value in outcome.weights.items() if name.startswith(last)} | {
        f"ema.{name}": value for name, value in outcome.ema.items()
    }


def unnumbered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition(".")[2]: value for name, value in weights.items()}


@pytest.mark.parametrize("warmup", [False, True])
def test_a_player_that_stays_keeps_its_optimiser_and_average(warmup: bool, tmp_path: Path) -> None:
    whole = unnumbered(fit((9,), tmp_path / "whole", warmup=warmup))
    assert_same(unnumbered(fit((4, 2, 3), tmp_path / "kept", warmup=warmup)), whole)
    copied = unnumbered(fit((4, 2, 3), tmp_path / "copied", copies=True))
    assert not torch.equal(copied["players.player.weight"], whole["players.player.weight"])


def test_later_stages_get_what_earlier_ones_made(tmp_path: Path) -> None:
    stages, settings = MINIATURES["stages"](0, 20)
    weights = train_stages(stages, settings, tmp_path).weights
    made = {name.removeprefix("0.players.student."): v for name, v in weights.items() if name.startswith("0.players.")}
    for place in ("1", "2"):
        prefix = f"{place}.frozen.teacher."
        assert_same({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}, made)
    before = MINIATURES["stages"](0, 20)[0][0].method.players["student"].state_dict()
    assert any(not torch.equal(made[name], before[name]) for name in before)


@pytest.mark.parametrize("what", ["normal", "shared"])
def test_noise_is_new_in_every_stage(what: str, tmp_path: Path) -> None:
    """`every`, `offset` and `start` count the stage's steps; noise is that of the run's."""
    seen: list[Tensor] = []

    def listen(method: Method, before: int) -> None:
        kind = type(method)

        def prepare(self: Method, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
            seen.append(draw.normal("z", 3) if what == "normal" else draw.shared.normal("z", 3))
            return kind.prepare(self, batch, draw, due)

        override(method, prepare=prepare)

    stages, settings = MINIATURES["stages"](0, 9)
    train_stages(stages, settings, tmp_path, listen)
    assert len(seen) == 9
    assert len({tuple(noise.flatten().tolist()) for noise in seen}) == 9
