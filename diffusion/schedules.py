"""Which checkpoint, which student, which decay: schedules and partitions as plain functions."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn


def disback_index(iteration: int, num_checkpoints: int, interval: int) -> int:
    """Which network of a degradation path is the real score: max(N - 1 - iteration // interval, 0).

    0 is the teacher, N = num_checkpoints the most degraded one, where the critic starts: the first
    target is N - 1. Source: Zhang et al. 2025 (DisBack).

    Raises:
        ValueError: a negative iteration, num_checkpoints < 0 or interval < 1.
    """
    if iteration < 0 or num_checkpoints < 0 or interval < 1:
        raise ValueError(
            f"need iteration >= 0, num_checkpoints >= 0 and interval >= 1, "
            f"got {iteration}, {num_checkpoints} and {interval}"
        )
    return max(num_checkpoints - 1 - iteration // interval, 0)


@overload
def msd_student_index(labels: Tensor, num_students: int, num_classes: int) -> Tensor: ...
@overload
def msd_student_index(labels: int, num_students: int, num_classes: int) -> int: ...
def msd_student_index(labels: Tensor | int, num_students: int, num_classes: int) -> Tensor | int:
    """The student that owns each label, in consecutive blocks: floor(label*K/n).

    Source: Song et al. 2024 (Multi-student distillation).

    Args:
        labels: integers in [0, num_classes), any shape.

    Raises:
        ValueError: not 1 <= num_students <= num_classes.
    """
    if not 1 <= num_students <= num_classes:
        raise ValueError(f"num_students={num_students} is not allowed: 1 to num_classes ({num_classes})")
    # Products of labels of 8 bits would wrap.
    wide = labels.long() if isinstance(labels, Tensor) else labels
    return wide * num_students // num_classes


@torch.no_grad()
def couple_(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay*target + (1 - decay)*source for every parameter, in place (Flash-DMD: critic <- student).

    Raises:
        ValueError: the modules' parameters differ in name or shape, or decay is outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} is not allowed: 0 to 1")
    into, out = dict(target.named_parameters()), dict(source.named_parameters())
    if {k: p.shape for k, p in into.items()} != {k: p.shape for k, p in out.items()}:
        raise ValueError("coupled networks need parameters of the same names and shapes")
    if into:
        torch._foreach_lerp_(list(into.values()), [out[name] for name in into], 1 - decay)


def ema_decay(
    step: int,
    *,
    gamma: float | None = None,
    halflife_images: float | None = None,
    batch_size: int | None = None,
    rampup: float | None = 0.05,
) -> float:
    """Decay of a moving average at a step, counted from 1.

    Args:
        gamma: power profile (1 - 1/step)^(gamma + 1) (Karras et al. 2024, EDM2).
        halflife_images: half-life in images, 0.5^(B/min(H, rampup*B*step)) (Karras et al. 2022, EDM).
        batch_size: images per step; needed with halflife_images.
        rampup: bounds the half-life by this share of the images seen; None does not.

    Raises:
        ValueError: step < 1, or not exactly one of gamma and halflife_images with what it needs.
    """
    if step < 1:
        raise ValueError(f"step={step} is not allowed: steps count from 1")
    if (gamma is None) == (halflife_images is None):
        raise ValueError("give either gamma or halflife_images")
    if gamma is not None:
        return (1 - 1 / step) ** (gamma + 1)
    if batch_size is None:
        raise ValueError("halflife_images needs batch_size")
    halflife = halflife_images if rampup is None else min(halflife_images, rampup * batch_size * step)
    return 0.5 ** (batch_size / halflife)
