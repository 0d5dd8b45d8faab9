"""The interface of a source of targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw
from visiondistill.models.network import evaluating
from visiondistill.parts import Part


class Teacher(Part):
    """Answers to a batch of images.

    Attributes:
        num_classes: of its logits, where known.
        stages, embedding: what the terms read besides the logits; set by the `Distiller`.
        online: it learns with the student: its answers are made within the student's turn, with gradients.
        replays: `views` of the training images that it has answers to, where it can be asked about no others; None
            for a source that answers to any image.
    """

    num_classes: int | None = None
    stages: tuple[int, ...] = ()
    embedding: bool = False
    online: bool = False
    replays: frozenset[str] | None = None

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

    def embedding_size(self) -> int:
        """`D` of its pooled features; errors as in `stage_index`."""
        raise TypeError(f"{type(self).__name__} has no features, only logits")

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` of images in [0, 1], for whoever measures the source as a classifier."""
        with evaluating(*self.players.values(), *self.frozen.values()):
            return self.targets({"image": images})["logits"]

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch if self.online else batch | {"teacher": self.targets(batch["train"])}

    def targets(self, data: Batch) -> dict[str, Any]:
        """`{"logits": [B, K]}` for a batch with "image" and "index", and where asked for
        `"features": {stage: [B, C, H, W]}` and `"embedding": [B, D]`."""
        raise NotImplementedError(f"{type(self).__name__} must define targets()")


def answers_images(source: nn.Module | None) -> bool:
    """Whether there is a teacher that can be measured on images of any kind."""
    return source is not None and getattr(source, "replays", None) is None
