"""Similarity-preserving distillation.

Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visiondistill.engine.across import gather_across
from visiondistill.losses.common import directions, lift
from visiondistill.terms.base import Needs, Term, View


def similarity_preserving_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Mean squared difference of how similar the images of a batch are to each other; a scalar.

    Similarities are inner products of whole features; those of one image to all are a unit vector. A
    rotation or a factor common to all rows of either side changes nothing. The value is at most `4 / B`.

    Args:
        student_feature, teacher_feature: `[B, ...]`, B >= 2; all other sizes may differ.

    Raises:
        ValueError: batch sizes differ, or only one image is there to compare.
    """
    if len(student_feature) != len(teacher_feature) or len(student_feature) < 2:
        raise ValueError(
            f"similarities need features of the same 2 images or more, got {tuple(student_feature.shape)} and "
            f"{tuple(teacher_feature.shape)}: choose a larger batch"
        )
    return (_similarities(student_feature) - _similarities(teacher_feature)).square().mean()


def _similarities(feature: Tensor) -> Tensor:
    """`[B, ...]` to `[B, B]` with rows of length 1."""
    rows = lift(feature).flatten(1)
    # A common factor cancels; without it the squares of large features overflow.
    rows = rows / rows.detach().abs().amax().clamp(min=1e-12)
    # Autocast would round products, whose differences are small.
    with torch.autocast(rows.device.type, enabled=False):
        return directions(rows @ rows.mT)


class SimilarityPreserving(Term):
    """Which images are alike, stage by stage, over the whole global batch; the sum over the stages.

    Args:
        student_stages, teacher_stages: which stages, in pairs; counted from 0, -1 for the last.

    Raises:
        SettingsError: the two lists differ in length, or are empty.
    """

    def __init__(self, student_stages: Sequence[int] = (-1,), teacher_stages: Sequence[int] = (-1,)) -> None:
        super().__init__()
        self.needs = Needs.of_pairs(student_stages, teacher_stages, per_sample=False)

    def forward(self, view: View) -> Tensor:
        pairs = zip(view.student_features, view.teacher_features, strict=True)
        return sum(similarity_preserving_loss(gather_across(ours), gather_across(theirs)) for ours, theirs in pairs)
