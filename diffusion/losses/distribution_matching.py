"""Losses that move a generator by the difference of two scores."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.tensors import factor, lead, lift, reduce, same_shape


def dmd_loss(
    x: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    *,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    floor: float = 1e-6,
) -> Tensor:
    """Distribution matching distillation: a scalar whose gradient w.r.t. x is the field g over numel(x).

    g = (fake_x0 - teacher_x0) / max(mean|x - teacher_x0| per sample, floor) * weight, and the value
    is mean(g^2)/2, which is not a sign of convergence. It is 0, and so is its gradient, where the
    two scores agree. Source: Yin et al. 2024 (DMD, equations 7 and 8, and DMD2's
    release, which has no alpha_t).

    Args:
        x: generated samples `[B, ...]`.
        teacher_x0: the frozen teacher's x0 at the noised x, guided where it is; no gradient.
        fake_x0: the x0 of the score model of generated samples; no gradient.
        normalize: False is Diff-Instruct (equation 3.2) and VSD (whose gradient is ours times numel(x)/B).
        weight: `[B]`, per sample: alpha_t for the paper's DMD, `fdistill_weight` for f-distill.
        mask: bool, leading or of x's rank: the mean is over selected elements, the normaliser over all.
        floor: least normaliser, so that x = teacher_x0 stays finite.

    Returns:
        Scalar, at least float32; the gradient has x's dtype.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(x=x, teacher_x0=teacher_x0, fake_x0=fake_x0)
    x, teacher_x0, fake_x0 = lift(x), lift(teacher_x0).detach(), lift(fake_x0).detach()
    field = fake_x0 - teacher_x0
    if normalize:
        field = field / _distance(x.detach(), teacher_x0).clamp(min=floor)
    if weight is not None:
        field = field * factor(weight, x)
    # (x - sg(x)) is 0 with gradient 1: unlike x - sg(x - field) it loses no digit of a small field.
    squares = (x - x.detach() + field) ** 2
    if mask is None:
        return squares.mean() / 2
    mask = lead(mask, x).expand_as(x)
    return torch.where(mask, squares, 0).sum() / mask.sum().clamp(min=1) / 2


def sid_loss(
    x: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    *,
    alpha: float = 1.2,
    floor: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """Score identity distillation: sum of d*((teacher_x0 - x) - alpha*d) / max(mean|x - teacher_x0|, floor).

    d = teacher_x0 - fake_x0. The graph through teacher_x0, fake_x0 and x is kept: the score networks
    must be called with gradient. Source: Zhou et al. 2024 (SiD), equations 22 and 23, without
    the released code's factor of 100.

    Args:
        x, teacher_x0, fake_x0: `[B, ...]`.
        alpha: 1.2 in the paper, 1.0 for AFHQ.

    Returns:
        Scalar, or `[B]` sums over the sample with `reduction="none"`; at least float32.

    Raises:
        ValueError: shapes differ, or unknown reduction.
    """
    same_shape(x=x, teacher_x0=teacher_x0, fake_x0=fake_x0)
    x, teacher_x0, fake_x0 = lift(x), lift(teacher_x0), lift(fake_x0)
    difference = teacher_x0 - fake_x0
    normaliser = _distance(x, teacher_x0).detach().clamp(min=floor)
    values = difference * ((teacher_x0 - x) - alpha * difference) / normaliser
    return reduce(values.flatten(1).sum(1), reduction)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return lead((x - y).abs().flatten(1).mean(1), x)
