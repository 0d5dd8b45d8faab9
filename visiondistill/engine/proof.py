"""Proof of learning: which player really learns from which term, over the first executions of every turn.

Most failures of distillation software are silent: a term that reaches nobody, a teacher that
moves, an average that never follows. The gradient of each term is taken on its own (the graph
itself, once compiled, would seem to reach more); the maxima stay on the device and are read once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visiondistill.engine.across import process_count
from visiondistill.engine.ema import Ema
from visiondistill.engine.errors import NotLearning
from visiondistill.engine.method import Terms, Turn
from visiondistill.engine.players import Player


@dataclass
class Verdict:
    """What a successful proof found.

    Attributes:
        reached: "turn/term" -> players that it sent a gradient to.
        waiting: terms whose value and gradient were 0 all the time (a warm-up from 0).
        declined: turns whose every update was declined or refused.
        warnings: terms in the product's turn that reach only other players.
    """

    reached: dict[str, list[str]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Proof:
    """Watches the next `window` executions of each turn from step `start` on, then judges."""

    def __init__(
        self,
        turns: Sequence[Turn],
        players: Mapping[str, Player],
        frozen: nn.Module,
        product: nn.Module,
        ema: Ema | None,
        window: int,
        start: int,
    ) -> None:
        self.turns, self.players, self.frozen, self.ema = turns, players, frozen, ema
        self.until = {turn.name: turn.count(start) + window for turn in turns}
        self.window = window
        followed = {id(p) for p in product.parameters()}
        self.product_players = {n for n, player in players.items() if any(id(p) in followed for p in player.parameters)}
        self.gradients: dict[tuple[str, ...], Tensor] = {}
        self.values: dict[tuple[str, ...], Tensor] = {}
        self.updates: dict[str, Tensor] = {}
        self.frozen_before = checksum(frozen.state_dict().values())
        self.players_before = {name: checksum(player.parameters) for name, player in players.items()}
        self.twin = _EmaTwin(ema) if ema is not None else None

    def open(self, step: int) -> bool:
        """Whether some turn has executions left to watch at `step`."""
        return any(turn.count(step) < self.until[turn.name] for turn in self.turns)

    def observe(self, turn: Turn, step: int, terms: Terms, movers: Sequence[Player]) -> None:
        """Note the gradient that each term alone sends to each mover."""
        if turn.count(step) >= self.until[turn.name]:
            return
        for name, term in terms.items():
            _keep(self.values, (turn.name, name), term.detach().abs())
            if not term.requires_grad:
                continue
            for player in movers:
                gradients = torch.autograd.grad(term, player.parameters, retain_graph=True, allow_unused=True)
                largest = [gradient.detach().abs().max() for gradient in gradients if gradient is not None]
                if largest:
                    _keep(self.gradients, (turn.name, name, player.name), torch.stack(largest).max())

    def settled(self, turn: Turn, hold: Tensor, average: bool) -> None:
        """Note whether the update happened (`hold` is 0), and follow it if the `average` does."""
        happened = 1 - hold
        self.updates[turn.name] = self.updates[turn.name] + happened if turn.name in self.updates else happened
        if average and self.twin is not None:
            self.twin.follow(hold)

    def judge(self) -> Verdict:
        """Read everything once and decide.

        Raises:
            NotLearning: a mover that got no gradient or did not move, a term whose value is not 0
                and that reaches nobody, a frozen network that moved, an average off its closed form.
        """
        gradients, values = _read(self.gradients), _read(self.values)
        updates = _read({(name,): count for name, count in self.updates.items()})
        verdict = Verdict(declined=sorted(name for (name,), count in updates.items() if count == 0))
        faults = self._judge_terms(gradients, values, verdict) + self._judge_movers(gradients, verdict)
        if not torch.equal(checksum(self.frozen.state_dict().values()), self.frozen_before):
            faults.append(f"a frozen network moved: {list(self.frozen)} must stay as they were loaded")
        if self.twin is not None and not self.twin.agrees():
            faults.append("the moving average does not follow its closed form")
        if faults:
            raise NotLearning("proof of learning failed:\n  - " + "\n  - ".join(faults))
        for text in verdict.warnings:
            warnings.warn(text, stacklevel=2)
        return verdict

    def _judge_terms(
        self, gradients: dict[tuple[str, ...], float], values: dict[tuple[str, ...], float], verdict: Verdict
    ) -> list[str]:
        faults = []
        moves = {turn.name: turn.moves for turn in self.turns}
        for (turn, term), value in values.items():
            reached = [player for player in moves[turn] if gradients.get((turn, term, player), 0.0) != 0.0]
            label = f"{turn}/{term}"
            if reached:
                verdict.reached[label] = reached
                if self.product_players & set(moves[turn]) and not self.product_players & set(reached):
                    verdict.warnings.append(
                        f"term '{label}' reaches only {reached}, not the player that is the product"
                    )
            elif value == 0.0:
                verdict.waiting.append(label)
            else:
                faults.append(
                    f"term '{label}' (largest value {value:.3g}) sent no gradient to any of {list(moves[turn])} "
                    f"in {self.window} executions: it is computed and teaches nothing"
                )
        return faults

    def _judge_movers(self, gradients: dict[tuple[str, ...], float], verdict: Verdict) -> list[str]:
        faults = []
        for name, player in self.players.items():
            turns = {turn.name for turn in self.turns if name in turn.moves}
            if not turns:
                faults.append(f"player '{name}' is moved by no turn; put it into `frozen`")
            elif not any(gradient for (_, _, to), gradient in gradients.items() if to == name):
                if any(f"{turn}/{term}" in verdict.waiting for turn, term, to in gradients if to == name):
                    continue  # its terms have not begun
                faults.append(f"player '{name}' got no gradient in {self.window} executions of {sorted(turns)}")
            elif turns - set(verdict.declined) and torch.equal(checksum(player.parameters), self.players_before[name]):
                faults.append(f"player '{name}' got gradients but never moved: is its learning rate 0?")
        return faults


class _EmaTwin:
    """The closed form of the average for one tensor, in fp64."""

    def __init__(self, ema: Ema) -> None:
        self.ema, self.live = ema, ema.live[0]
        self.value, self.updates = ema.values[0].double().clone(), ema.updates.double().clone()

    def follow(self, hold: Tensor) -> None:
        happened = 1 - hold.double()
        weight = happened * (1 - self.ema.decay_at(self.updates))
        self.updates += happened
        self.value += weight * (self.live.detach().double() - self.value)

    def agrees(self) -> bool:
        return bool(torch.allclose(self.ema.values[0].double(), self.value, rtol=1e-4, atol=1e-6))


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """One exact integer per tensor, the wrapping sum of its words: a changed value changes it."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1)
        data = data.to(torch.uint8) if data.dtype == torch.bool else data
        sums.append(data.view(words[data.element_size()]).sum(dtype=torch.int64))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _keep(maxima: dict[tuple[str, ...], Tensor], name: tuple[str, ...], value: Tensor) -> None:
    value = value.double()
    maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value


def _read(maxima: dict[tuple[str, ...], Tensor]) -> dict[tuple[str, ...], float]:
    if not maxima:
        return {}
    values = torch.stack([value.double() for value in maxima.values()])
    if process_count() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(maxima, values.tolist(), strict=True))
