"""Matching of intermediate features.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015,
arXiv 1412.6550, equation 3, as a mean over elements. The paper trains hints first and labels
afterwards; as a term it is trained together with the label's loss, as in the comparisons of later papers.
"""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.common import Reduction, paired_features, reduce


def hint_loss(student_feature: Tensor, teacher_feature: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Mean squared difference of two feature maps.

    Args:
        student_feature, teacher_feature: `[B, C, H, W]`, the student's after its regressor.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ or unknown reduction.
    """
    student, teacher = paired_features(student_feature, teacher_feature)
    return reduce((student - teacher).square().flatten(1).mean(1), reduction)
