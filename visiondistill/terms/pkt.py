"""Probabilistic knowledge transfer.

Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018, arXiv 1803.10837,
with the cosine kernel; as released over all pairs of a batch, while the paper pairs no image with itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visiondistill.engine.across import gather_across
from visiondistill.losses.common import directions, lift
from visiondistill.losses.kd import divergence
from visiondistill.terms.base import Needs, Term, View

SMALLEST_KERNEL = 1e-7


def pkt_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Divergence `KL(teacher || student)` of the probabilities that one image picks another; a scalar.

    Image i picks j with a probability that is proportional to `(1 + cos(x_i, x_j)) / 2`, itself included.
    The mean is over all B^2 pairs, so that values are small. The length of a row, and a rotation of all
    of them, change nothing.

    Args:
        student_features, teacher_features: `[B, D]`, B >= 2; widths may differ.

    Raises:
        ValueError: batch sizes differ, features are not `[B, D]`, or only one image is there to compare.
    """
    if student_features.ndim != 2 or teacher_features.ndim != 2 or len(student_features) != len(teacher_features):
        raise ValueError(
            f"features must be [B, D] of one batch, got {tuple(student_features.shape)} and "
            f"{tuple(teacher_features.shape)}"
        )
    if len(student_features) < 2:
        raise ValueError("probabilities of picking another image need 2 images or more, got 1: choose a larger batch")
    return divergence(_log_picks(teacher_features), _log_picks(student_features)).mean() / len(student_features)


def _log_picks(features: Tensor) -> Tensor:
    """`[B, D]` to logarithms of probabilities `[B, B]`."""
    rows = directions(lift(features))
    # Autocast would round cosines, whose differences are small.
    with torch.autocast(rows.device.type, enabled=False):
        cosines = rows @ rows.mT
    # Rounding takes them below -1.
    kernel = (0.5 + 0.5 * cosines).clamp(min=0) + SMALLEST_KERNEL
    return kernel.log() - kernel.sum(1, keepdim=True).log()


class PKT(Term):
    """Neighbours in the teacher's embedding are neighbours in the student's, over the whole global batch."""

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs(student_embedding=True, teacher_embedding=True, per_sample=False)

    def forward(self, view: View) -> Tensor:
        return pkt_loss(gather_across(view.student_embedding), gather_across(view.teacher_embedding))
