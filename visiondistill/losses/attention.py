"""Attention transfer.

Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928, equation 2,
as a mean over positions. Odd powers, which code in circulation leaves with their sign, are refused.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from visiondistill.losses.common import Reduction, maps_of_one_size, reduce


def attention_transfer_loss(
    student_feature: Tensor, teacher_feature: Tensor, p: int = 2, reduction: Reduction = "mean"
) -> Tensor:
    """Mean squared difference of two attention maps: the mean over channels of `f^p`, as a unit vector.

    A factor on either feature changes nothing. The larger map is averaged down to the smaller one
    before the power.

    Args:
        student_feature, teacher_feature: `[B, C, H, W]`; channels and sizes may differ.
        p: even power >= 2.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: batch sizes differ, p is odd or below 2, or unknown reduction.
    """
    if p < 2 or p % 2:
        raise ValueError(f"p must be an even number >= 2, got {p}")
    student, teacher = maps_of_one_size(student_feature, teacher_feature)
    difference = _attention(student, p) - _attention(teacher, p)
    return reduce(difference.square().mean(1), reduction)


def _attention(feature: Tensor, p: int) -> Tensor:
    """`[B, C, H, W]` to unit vectors `[B, H * W]`."""
    return normalize(feature.pow(p).mean(1).flatten(1), dim=1)
