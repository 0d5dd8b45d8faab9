"""Norm and direction of features.

Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature Norm and
Direction, arXiv 2305.17007; as in the released code, which divides by 0 where a class's mean feature is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from visiondistill.losses.common import Reduction, directions, divisor, lift, reduce


def nd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    class_means: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """`1 - <f_s, e_y> / max(|f_s|, |f_t|)`, e_y the unit vector of the label's mean feature; in [0, 2].

    A student feature that is shorter than the teacher's is drawn along e_y with a constant force,
    which lengthens it; once it is as long, only its direction still matters.

    Args:
        student_features, teacher_features: `[B, D]`, pooled; the student's after its adapter.
        class_means: `[K, D]` of the teacher's features. A class whose mean is 0 has no direction: its rows give 1,
            and so do rows in which both features are 0.
        target: `[B]` int64 in [0, K).
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ or unknown reduction.
    """
    if student_features.shape != teacher_features.shape or student_features.shape[1:] != class_means.shape[1:]:
        raise ValueError(
            f"features must be [B, D] and class means [K, D], got {tuple(student_features.shape)}, "
            f"{tuple(teacher_features.shape)} and {tuple(class_means.shape)}"
        )
    student, teacher = lift(student_features), lift(teacher_features)
    direction = directions(lift(class_means)[target])
    longer = torch.maximum(vector_norm(student, dim=1), vector_norm(teacher, dim=1))
    return reduce(1 - (student * direction).sum(1) / divisor(longer), reduction)
