"""Hierarchical context loss of knowledge review.

Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044,
section 3.3 and figure 3b; the levels and their weights as in the released code.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from visiondistill.losses.common import Reduction, paired_features, reduce

POOLED = (4, 2, 1)


def hierarchical_context_loss(
    student_feature: Tensor, teacher_feature: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Mean squared difference of two maps, and of both averaged down to 4x4, 2x2 and 1x1.

    The pooled ones weigh 1/2, 1/4 and 1/8; sizes that are not smaller than the map are left out, and
    the sum is divided by the weights used.

    Args:
        student_feature, teacher_feature: `[B, C, H, W]`.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ or unknown reduction.
    """
    student, teacher = paired_features(student_feature, teacher_feature)
    difference = student - teacher
    value, total, weight = _mean_square(difference), 1.0, 1.0
    for size in (size for size in POOLED if size < min(difference.shape[-2:])):
        weight /= 2
        # The pooled difference is the difference of the pooled maps.
        value = value + weight * _mean_square(adaptive_avg_pool2d(difference, size))
        total += weight
    return reduce(value / total, reduction)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)
