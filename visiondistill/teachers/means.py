"""What a teacher answers to the images of a class, on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visiondistill.data.stream import in_order
from visiondistill.teachers.base import Teacher

AT_ONCE = 256


@torch.no_grad()
def class_means(teacher: Teacher, data: Any, answer: Callable[[dict[str, Any]], Tensor], absent: Tensor) -> Tensor:
    """`[K, D]` in one pass over the images, as an evaluation sees them; those without a label count in no class.

    Args:
        teacher: is asked on the device of `absent`.
        data: as of `data.in_order`, with "image" and "label".
        answer: from the teacher's targets of a batch to `[B, D]`.
        absent: `[K, D]`, the rows of classes without an image.
    """
    sums, counts = torch.zeros_like(absent), absent.new_zeros(len(absent))
    for batch in in_order(data, AT_ONCE):
        batch = {name: column.to(sums.device) for name, column in batch.items()}
        labelled = batch["label"] >= 0
        label = batch["label"][labelled]
        sums.index_add_(0, label, answer(teacher.targets(batch))[labelled].to(sums.dtype))
        counts.index_add_(0, label, torch.ones_like(label, dtype=counts.dtype))
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], absent)
