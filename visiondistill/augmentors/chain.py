"""Several augmentors, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw
from visiondistill.parts import Part

if TYPE_CHECKING:
    from visiondistill.models.network import Network
    from visiondistill.teachers.base import Teacher


class Chain(Part):
    """Applies augmentors in the order given, such as `Augment` and then `Mix`.

    Args:
        parts: the augmentors; each kind once, or two would use the same draws. Such that bring
            networks, streams or turns of their own stand alone.

    Raises:
        SettingsError: no part, one kind twice, or a part with networks, streams or turns.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        kinds = [type(part).__name__ for part in parts]
        if not parts or len(set(kinds)) < len(kinds):
            raise SettingsError(f"a chain needs augmentors, each kind once, got {kinds}")
        for part in parts:
            if part.players or part.frozen or part.streams or part.turns():
                raise SettingsError(
                    f"{type(part).__name__} has networks, streams or turns of its own: let it stand alone"
                )
        self.chain = tuple(parts)
        views = [part.views for part in parts]
        self.views = None if None in views else frozenset().union(*views)
        self.soft_labels = any(getattr(part, "soft_labels", False) for part in parts)

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        for part in self.chain:
            part.connect(student, teacher)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        for part in self.chain:
            batch = part.prepare(batch, draw, due)
        return batch
