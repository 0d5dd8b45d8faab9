"""Who is moved by a turn, who is not, and what happens where a turn declines."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Job, apart, assert_same, override, play, state, train_stages
from miniatures import MINIATURES, adapted, built, project
from safetensors.torch import load_file
from torch import Tensor, nn

from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Stage, Terms, Turn
from visiondistill.engine.method import Combine


class Watch:
    """Compares all players after each turn with what they were after the turn before."""

    def __init__(self, method: Method) -> None:
        self.method, kind = method, type(method)
        self.moves = {turn.name: turn.moves for turn in method.turns()}
        self.moved: set[str] = set()
        self.turns: set[str] = set()
        self.before, self.gradients = self._states(), self._gradients()

        def after(method: Method, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
            self.compare(turn)
            return kind.after(method, turn, carry)

        override(method, after=after)

    def compare(self, turn: str) -> None:
        now, gradients = self._states(), self._gradients()
        self.turns.add(turn)
        for player in self.method.players:
            if player in self.moves[turn]:
                if any(not torch.equal(now[player][name], old) for name, old in self.before[player].items()):
                    self.moved.add(player)
            else:
                assert_same(now[player], self.before[player])
                assert_same(gradients[player], self.gradients[player])
        self.before, self.gradients = now, gradients
        assert all(p.grad is None and not p.requires_grad for p in self.method.frozen.parameters())

    def _states(self) -> dict[str, dict[str, Tensor]]:
        return {name: state(player) for name, player in self.method.players.items()}

    def _gradients(self) -> dict[str, dict[str, Tensor]]:
        return {
            player: {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            for player, module in self.method.players.items()
        }


@pytest.mark.parametrize("name", MINIATURES)
def test_a_turn_touches_only_the_players_that_it_names(name: str, tmp_path: Path) -> None:
    stages, settings = MINIATURES[name](0, 20)
    watches: list[Watch] = []
    outcome = train_stages(
        stages, settings | {"grad_accum_steps": 2}, tmp_path, lambda method, _: watches.append(Watch(method))
    )
    assert not outcome.error
    for watch in watches:
        assert watch.turns == set(watch.moves)
        assert watch.moved == set(watch.method.players)
        assert all(p.grad is None for p in watch.method.parameters())


def test_pixels_are_clipped_after_the_update(tmp_path: Path) -> None:
    stages, settings = MINIATURES["matching"](0, 20)
    pixels = train_stages(stages, settings, tmp_path).weights["0.players.images.pixels"]
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_bank_holds_the_gathered_rows_of_every_micro_batch(tmp_path: Path) -> None:
    """Of one epoch of 64 rows every row is replaced; each step mixes with the decay of before the step."""
    stages, settings = MINIATURES["bank"](0, 8)
    fresh = MINIATURES["bank"](0, 8)[0][0].method
    whole = train_stages(stages, settings | {"grad_accum_steps": 2}, tmp_path)
    assert (whole.weights["0.bank"] != fresh.bank).any(dim=1).all()
    assert whole.weights["0.decay"] == pytest.approx(0.5 - 0.4 * 0.9**8)


def test_a_combined_gradient_may_lie_in_memory_as_it_likes(tmp_path: Path) -> None:
    """As a compiled backward lays it out, where a fused optimiser reads plain memory."""
    outcomes = []
    for turned in (False, True):
        stages, settings = MINIATURES["projected"](0, 10)
        kind = type(stages[0].method)

        def combine(groups: dict[str, dict[str, Tensor]], turned: bool = turned) -> dict[str, Tensor]:
            gradients = project(groups)
            return {n: g.mT.contiguous().mT if turned and g.ndim > 1 else g for n, g in gradients.items()}

        def turns(self: Method, combine: Combine = combine, kind: type[Method] = kind) -> tuple[Turn, ...]:
            return tuple(replace(turn, combine=combine) for turn in kind.turns(self))

        override(stages[0].method, turns=turns)
        outcomes.append(train_stages(stages, settings, tmp_path / str(turned)))
    assert not outcomes[0].error
    assert apart(outcomes[0].weights, outcomes[1].weights) < 1e-12


def test_adversarial_turn_declines_sometimes(tmp_path: Path) -> None:
    """Otherwise the equality and resume tests of this miniature would say nothing about declining."""
    stages, settings = MINIATURES["adversarial"](0, 20)
    augmentor, limit = stages[0].method.players["augmentor"], stages[0].method.limit
    margins: list[float] = []
    versions: list[Tensor] = []
    kind = type(stages[0].method)

    def augmentor_loss(self: Method, batch: Batch) -> tuple[Terms, Carry]:
        terms, carry = kind.augmentor_loss(self, batch)
        margins.append(-float(terms["disagreement"].detach()) - limit)
        versions.append(augmentor.weight.detach().clone())
        return terms, carry

    override(stages[0].method, augmentor_loss=augmentor_loss)
    outcome = train_stages(stages, settings, tmp_path)
    versions.append(outcome.weights["0.players.augmentor.weight"])
    stood = [torch.equal(old, new) for old, new in itertools.pairwise(versions)]
    assert stood == [margin > 0 for margin in margins]
    assert 3 <= sum(stood) <= 17


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.by


class Decliner(Method):
    """A turn whose loss has no data, so that an update depends on the method's state alone.

    It counts its updates, and writes to a buffer of its player.
    """

    def __init__(self, declined: Sequence[int], norm: bool = False) -> None:
        norms = nn.BatchNorm1d(4) if norm else nn.Identity()
        super().__init__({"player": built(0, lambda: nn.Sequential(nn.Linear(3, 4), norms, Shift()))})
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._declined = set(declined)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("only", self.loss, moves=("player",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        margin = 1.0 if draw.step in self._declined else -1.0
        return batch | {"x": torch.arange(12.0, dtype=torch.float64).view(4, 3), "margin": torch.tensor(margin)}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        out = self.players["player"](batch["x"])
        return {"fit": F.mse_loss(out, batch["x"].sin().sum(1, keepdim=True).expand_as(out))}, {"skip": batch["margin"]}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        return {"updates": self.updates + 1, "players.player.2.by": self.players["player"][2].by + 0.1}


def test_dropout_differs_between_steps_and_micro_batches(tmp_path: Path) -> None:
    """Also for a method that prepares nothing."""
    kept = {}
    for steps in (1, 2):
        job = Job(f"{steps}", "masks", steps=steps, settings={"grad_accum_steps": 2})
        kept[steps] = play(job, tmp_path).weights["0.kept"]
    parts = [part for steps in kept for part in kept[steps].chunk(2)]
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 4


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "optim",
    [
        Optim(lr=0.1, weight_decay=0.1),
        Optim("sgd", lr=0.01, options={"momentum": 0.9}),
        Optim("lamb", lr=0.01),
    ],
    ids=lambda optim: optim.name,
)
def test_a_declined_turn_leaves_no_trace(optim: Optim, norm: bool, tmp_path: Path) -> None:
    """Twelve steps of which five decline are seven steps: weights, moments, buffers, state and average."""
    declined = (0, 1, 5, 6, 11)
    settings = {"batch_size": 4, "ema_decay": 0.8}
    some = train_stages([Stage(Decliner(declined, norm), 12, {"player": optim})], settings, tmp_path / "some")
    none = train_stages([Stage(Decliner((), norm), 7, {"player": optim})], settings, tmp_path / "none")
    assert not some.error
    assert some.weights["0.updates"] == 7
    assert_same(some.weights, none.weights)
    assert_same(some.ema, none.ema)


def test_average_follows_weights_and_running_statistics(tmp_path: Path) -> None:
    decay, stages = 0.8, [Stage(Decliner((), norm=True), 10, {"player": Optim(lr=0.1)})]
    player, kind = stages[0].method.players["player"], Decliner
    expected = {name: value.clone() for name, value in state(player).items()}

    def after(self: Method, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        for name, value in state(player).items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
        return kind.after(self, turn, carry)

    override(stages[0].method, after=after)
    outcome = train_stages(stages, {"batch_size": 4, "ema_decay": decay}, tmp_path)
    for name in ("0.0.weight", "0.1.weight", "0.1.running_mean", "0.1.running_var"):
        torch.testing.assert_close(outcome.ema[name], expected[name], rtol=0, atol=1e-7)  # its weight is fp32
        assert not torch.allclose(outcome.ema[name], outcome.weights[f"0.players.player.{name[2:]}"], atol=1e-6)


class Twins(Method):
    """Two LoRA players; the second learns from what the first says, in a turn of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__({"first": first, "second": second})

    def turns(self) -> tuple[Turn, ...]:
        return tuple(Turn(name, getattr(self, f"{name}_loss"), moves=(name,)) for name in ("first", "second"))

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        x, time = draw.normal("x", 2), draw.uniform("time", 1)
        with self.players["first"].disable_adapter():
            return batch | {"x": x, "time": time, "before": self.players["first"](x, time)}

    def first_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        said = self.players["first"](batch["x"], batch["time"])
        return {"away": F.mse_loss(said, batch["before"] + 1)}, {"said": said}

    def second_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        return {"near": F.mse_loss(self.players["second"](batch["x"], batch["time"]), batch["said"])}, {}


def test_adapters_over_one_base_train_as_over_two(tmp_path: Path) -> None:
    """Players that hold the same Parameter objects for their base, which no checkpoint holds."""
    outcomes = []
    for name in ("shared", "separate"):
        first = built(1, adapted)
        base = {id(p): p for p in first.parameters() if not p.requires_grad} if name == "shared" else {}
        method = Twins(first, copy.deepcopy(first, base))
        stage = Stage(method, 10, {"default": Optim(lr=1e-2)})
        outcomes.append(train_stages([stage], {"batch_size": 4}, tmp_path / name))
    assert not outcomes[0].error
    assert_same(outcomes[0].weights, outcomes[1].weights)
    assert outcomes[0].weights["0.players.second.base_model.model.outer.lora_B.default.weight"].abs().max() > 1e-3
    saved = load_file(tmp_path / "shared" / "checkpoints" / "step_000000010" / "weights.safetensors")
    assert len(saved) == 8
    assert all("lora" in key for key in saved)
