"""The contract between a training method and the one loop.

A `Method` owns networks and says *what* is optimised: players (trained), frozen networks, turns
(whose loss moves whom, and when). The loop in `loop.py` owns *how*: batches, gradients, guards,
optimisers, averages, checkpoints. Neither knows the other's business, so a new method is a new
file and the loop stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from visiondistill.engine.rng import Draw

Batch = dict[str, Any]  # nested dict of tensors; one entry per stream, plus what `prepare` adds
Terms = dict[str, Tensor]  # {"group/term" or "term": weighted scalar}; their sum is the turn's loss
Carry = dict[str, Tensor]  # what later turns of the step and `after` receive; detached by the engine
Combine = Callable[[dict[str, dict[str, Tensor]]], dict[str, Tensor]]


class Stream(Protocol):
    """A named source of batches, addressed by step number.

    `visiondistill.data.Stream` is the implementation for data sets; anything with these two
    members will do.
    """

    batch_size: int
    """Rows of the global batch, over all processes and micro-batches."""

    def open(
        self, start: int, rows: Sequence[tuple[int, int]], seed: int, device: torch.device
    ) -> Iterator[list[Batch]]:
        """Yield, for step `start`, `start + 1`, ..., one batch per `(low, high)` of `rows`.

        `(low, high)` are rows of that step's global batch. What is yielded depends on the step,
        the rows and the seed alone, never on what was read before. Batches may lie anywhere; the
        engine moves them to `device`, which is told so that data can be kept there.
        """
        ...


@dataclass(frozen=True)
class Turn:
    """One optimiser update within a step: a loss and the players that it moves.

    Args:
        name: "student", "critic", "augmentor" ...
        loss: `batch -> (terms, carry)`, pure in tensors: no step number, generator or schedule
            inside. Compiled to one graph where the run asks for it.
        moves: players whose optimisers step in this turn. All others are frozen and in eval mode.
        every, offset, start: the turn is due at steps of its stage where `step >= start` and
            `(step - start) % every == offset`.
        combine: `{group: {"player.parameter": global gradient}} -> {"player.parameter": gradient}`
            replaces the sum of the terms. The group of a term is its name up to the first "/".
        compile: False where the loss cannot become one graph (say why in the method).
        accumulate: False for losses that are not a mean over rows (bilevel, gradient matching):
            the process's share of the batch is then prepared once more, whole. False also for
            losses between rows: `gather_across` joins processes, not micro-batches.
    """

    name: str
    loss: Callable[[Batch], tuple[Terms, Carry]]
    moves: tuple[str, ...]
    every: int = 1
    offset: int = 0
    start: int = 0
    combine: Combine | None = None
    compile: bool = True
    accumulate: bool = True

    def __post_init__(self) -> None:
        if not self.moves:
            raise ValueError(f"turn '{self.name}' moves no player: name at least one in `moves`")
        if self.every < 1 or not 0 <= self.offset < self.every or self.start < 0:
            raise ValueError(
                f"turn '{self.name}': need every >= 1, 0 <= offset < every and start >= 0, "
                f"got every={self.every}, offset={self.offset}, start={self.start}"
            )

    def due(self, step: int) -> bool:
        """Whether the turn plays at `step` of its stage."""
        return step >= self.start and (step - self.start) % self.every == self.offset

    def count(self, step: int) -> int:
        """How often the turn played before `step`."""
        return max(0, -((self.start + self.offset - step) // self.every))


class Frozen(nn.ModuleDict):
    """Networks that are only read: always in eval mode, without gradients, absent from checkpoints."""

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(modules)
        super().train(False).requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode, whatever is asked: `method.train()` must not wake a teacher."""
        return super().train(False)


class Method(nn.Module):
    """Base class of every training method; see the top of this module and `Turn`.

    Set `players`, and where needed `frozen` and `streams`, in the constructor; override `turns`
    and, as needed, the hooks below. Buffers registered on the method are its state (memory banks,
    schedules): saved and restored with the run, written by the engine with what `after` returns.

    What an author keeps to: randomness (dropout apart) comes from `draw` in `prepare`; every mover
    receives a gradient in every call of its turn; reference passes live in `prepare`; nobody but
    the engine touches `requires_grad`, `train`/`eval` or `.grad`; a loss over the whole batch uses
    `gather_across`, anything nonlinear in a gradient `mean_across`.
    """

    players: nn.ModuleDict
    frozen: Frozen
    streams: dict[str, Stream]

    def __init__(
        self,
        players: Mapping[str, nn.Module],
        frozen: Mapping[str, nn.Module] | None = None,
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        super().__init__()
        self.players = nn.ModuleDict(players)
        self.frozen = Frozen(frozen)
        self.streams = dict(streams or {})

    def setup(self, streams: dict[str, Stream]) -> None:
        """Compute once, before step 0, what the training data alone decide (class means, partitions).

        Write it into buffers: a resumed run restores them and does not call this again.
        """

    def turns(self) -> tuple[Turn, ...]:
        """The turns in order of play. Called once."""
        raise NotImplementedError(f"{type(self).__name__} must define turns()")

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        """Add to one micro-batch whatever the losses read: teacher outputs, noise, ramps.

        Runs under `no_grad` and the run's autocast, with players in the modes of the first due
        turn. Every micro-batch is prepared before any turn of the step moves a player.

        Args:
            batch: `{stream name: batch of that stream}` on the run's device.
            draw: this micro-batch's randomness; `draw.step` is the step of the stage.
            due: names of the turns that play in this step.
        """
        return batch

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """State writes that follow a turn's update: `{state name: new value | (rows, values)}`.

        State names are those of `state_dict()` (a buffer of the method, a player's parameter).
        The engine writes them only where the update happened.

        Args:
            turn: the turn's name.
            carry: its carry over all micro-batches: scalars averaged, the rest concatenated.
        """
        return {}

    def product(self) -> nn.Module:
        """The network that the moving average follows and that is exported: by default the first player."""
        return next(iter(self.players.values()))

    def presented(self, network: nn.Module) -> nn.Module:
        """What `watch` and `Result` get for the product, or for its average: by default that network itself."""
        return network

    def handover(self) -> Any:
        """What the next stage receives."""
        return self.product()

    @classmethod
    def workshop(cls) -> Any:
        """Who checks, measures and exports the product: a `visiondistill.workshop.Workshop`; None for classifiers."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
