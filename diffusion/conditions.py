"""What generated samples are conditioned on during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw

Conditions = Callable[[Batch, Draw], tuple[Any, Any]]
"""`(batch, draw) -> (condition, null condition)`, of equal structure, batch first. Prompts come from the
batch's streams, labels from the draw."""


class ClassLabels:
    """Labels drawn uniformly from 0 ... num_classes - 1; the null label is `num_classes`.

    Raises:
        ValueError: num_classes < 1.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} is not allowed: at least 1")
        self.num_classes = num_classes

    def __call__(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        labels = draw.integers("labels", 0, self.num_classes)
        return labels, torch.full_like(labels, self.num_classes)
