"""What all losses share: precision, shape checks, reduction."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import adaptive_avg_pool2d

Reduction = Literal["mean", "none"]

SMALLEST_NORM = 1e-12


def lift(x: Tensor) -> Tensor:
    """Half precision to float32: sums of exponentials lose all digits in 8 or 11 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def paired_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits, lifted. Raises ValueError unless both are the same `[B, K]`: broadcasting would hide a mix-up."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must have the same shape [B, K], "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    return lift(student_logits), lift(teacher_logits)


def check_labels(target: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless there is one label per row: a gather by fewer leaves rows out and says nothing."""
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target must be [B] of logits {tuple(logits.shape)}, got {tuple(target.shape)}")


def paired_features(student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps, lifted. Raises ValueError unless they have one shape: broadcasting would hide a mix-up."""
    if student_feature.shape != teacher_feature.shape:
        raise ValueError(
            "student and teacher features must have the same shape, "
            f"got {tuple(student_feature.shape)} and {tuple(teacher_feature.shape)}"
        )
    return lift(student_feature), lift(teacher_feature)


def maps_of_one_size(student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[B, C, H, W]`, lifted, the larger one averaged down to the smaller. Raises ValueError for two batches."""
    if student_feature.shape[0] != teacher_feature.shape[0]:
        raise ValueError(
            f"features must have the same batch size, got {tuple(student_feature.shape)} and "
            f"{tuple(teacher_feature.shape)}"
        )
    both = lift(student_feature), lift(teacher_feature)
    size = [min(a, b) for a, b in zip(both[0].shape[-2:], both[1].shape[-2:], strict=True)]
    student, teacher = (held if list(held.shape[-2:]) == size else adaptive_avg_pool2d(held, size) for held in both)
    return student, teacher


def directions(vectors: Tensor) -> Tensor:
    """Unit vectors along the last dimension; where there is no length there is no direction: 0, without gradient."""
    return vectors / divisor(vector_norm(vectors, dim=-1, keepdim=True))


def divisor(length: Tensor) -> Tensor:
    """Lengths to divide by: infinite where there is none, so that the quotient is 0, without gradient."""
    # By a small number instead, a vector of 0 would have a gradient of its reciprocal.
    return length.masked_fill(length < SMALLEST_NORM, math.inf)


def positive_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return temperature


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """`[B]` to its mean, or as it is. Raises ValueError for any other reduction."""
    if reduction == "mean":
        return values.mean()
    if reduction == "none":
        return values
    raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
