"""The interface of a source of targets."""

from __future__ import annotations

from typing import Any

from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw
from visiondistill.parts import Part


class Teacher(Part):
    """Answers to a batch of images.

    Attributes:
        num_classes: of its logits, where known.
        stages: those whose features the terms read; set by the `Distiller`.
    """

    num_classes: int | None = None
    stages: tuple[int, ...] = ()

    def stage_index(self, stage: int) -> int:
        """`stage` counted from 0.

        Raises:
            TypeError: the source has no features.
            ValueError: it has no such stage.
        """
        raise TypeError(f"{type(self).__name__} has no features, only logits")

    def feature_shapes(self) -> list[tuple[int, ...]]:
        """`(C, H, W)` of every stage; errors as in `stage_index`."""
        raise TypeError(f"{type(self).__name__} has no features, only logits")

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch | {"teacher": self.targets(batch["train"])}

    def targets(self, data: Batch) -> dict[str, Any]:
        """`{"logits": [B, K], "features": {stage: [B, C, H, W]}}` for a batch with "image" and "index"."""
        raise NotImplementedError(f"{type(self).__name__} must define targets()")
