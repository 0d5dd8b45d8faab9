"""What the axes of the `Distiller` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from visiondistill.engine.method import Batch, Carry, Stream, Turn
from visiondistill.engine.rng import Draw

if TYPE_CHECKING:
    from visiondistill.distiller import StudentSide
    from visiondistill.models.network import Network
    from visiondistill.teachers.base import Teacher
    from visiondistill.terms.base import Needs, View


class Part(nn.Module):
    """One choice on an axis: a term, a weighting, heads, an augmentor, a source of targets.

    A part may bring networks, streams, turns and state of its own; the `Distiller` puts those of
    all parts together under the part's name: player `p` of part `hint` is the method's player
    `hint_p` (the player "" is `hint`), its buffer `b` the state `parts.hint.b`, its carry entry
    `c` the carry `hint.c`.
    Buffers registered here are state: saved with the run, not exported.

    Attributes:
        players: networks to train. Those that none of the part's own turns moves train in the student's turn.
        frozen: networks to read only.
        streams: data of its own, under its own names.
        asks_teacher: it calls the teacher's networks itself, in a turn of its own.
        needs: what it reads of both networks in the student's turn; None for nothing.
        reads: streams of the `Distiller` besides "train" that this part reads; what no part reads is not opened.
        views: of an augmentor: what it does to images, in words such as "flip"; None where it does not say.
    """

    needs: Needs | None = None
    reads: tuple[str, ...] = ()
    asks_teacher: bool = False
    views: frozenset[str] | None = None

    def __init__(self) -> None:
        super().__init__()
        # Plain dicts, so that a network is registered once: among the method's players.
        self.players: dict[str, nn.Module] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.streams: dict[str, Stream] = {}

    def settle(self, student: Network, streams: Mapping[str, Stream]) -> None:
        """Complete `needs` and buffers from the student and the data: default stages, sizes of memories.

        Called before all checks; a TypeError or ValueError is reported under the part's name.
        """

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        """Build whatever depends on the networks' shapes, such as regressors, and put it into `players`.

        To keep `student` or `teacher` itself, put it into a tuple: it is registered elsewhere already.
        """

    def bind(self, side: StudentSide) -> None:
        """Take the student's turn as a function, to differentiate through it."""

    def turns(self) -> tuple[Turn, ...]:
        """Turns of its own, which follow the student's; `moves` names players as the part knows them, or "student"."""
        return ()

    def setup(self, streams: dict[str, Stream]) -> None:
        """`Method.setup`: fill buffers with what the training data alone decide."""

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        """`Method.prepare`, for what this part reads."""
        return batch

    def observe(self, view: View) -> Carry:
        """What `after` receives of the student's turn, where the part is no term and sets `needs`."""
        return {}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """`Method.after`, with the part's own carry and state names."""
        return {}
