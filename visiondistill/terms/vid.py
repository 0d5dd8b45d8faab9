"""Variational information distillation.

Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, CVPR 2019,
arXiv 1904.05835, with one variance per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, softplus

from visiondistill.losses.common import Reduction, lift, paired_features, reduce
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, Term, View

SMALLEST_VARIANCE = 1e-5


def vid_loss(predicted: Tensor, variance: Tensor, teacher_feature: Tensor, reduction: Reduction = "mean") -> Tensor:
    """`((t - m)^2 / v + log v) / 2`, averaged over elements: minus log-density without its constant.

    With v = 1 it is half of `hint_loss`; the best v of a channel is its mean squared error. It is
    negative where errors are small.

    Args:
        predicted, teacher_feature: `[B, C, H, W]`, m from the student and t.
        variance: `[C]`, > 0, v.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ or unknown reduction.
    """
    mean, teacher = paired_features(predicted, teacher_feature)
    if variance.shape != mean.shape[1:2]:
        raise ValueError(f"variance must be [C] of features {tuple(mean.shape)}, got {tuple(variance.shape)}")
    spread = lift(variance)[:, None, None]
    return reduce((0.5 * ((teacher - mean).square() / spread + spread.log())).flatten(1).mean(1), reduction)


class VID(Term):
    """A Gaussian around what the student's feature map predicts of the teacher's; the sum over the stages.

    Means come from three 1x1 convolutions, and each channel has a learned variance. All these are the player
    `<term>_predictors`, trained in the student's turn and not exported. The map of higher resolution is averaged
    down to the other's.

    Args:
        student_stages, teacher_stages: which stages, in pairs; counted from 0, -1 for the last.
        initial_variance: of every channel, > 1e-5.

    Raises:
        SettingsError: the two lists differ in length, or are empty.
        ValueError: initial_variance is not above 1e-5.
    """

    def __init__(
        self,
        student_stages: Sequence[int] = (-3, -2, -1),
        teacher_stages: Sequence[int] = (-3, -2, -1),
        initial_variance: float = 5.0,
    ) -> None:
        super().__init__()
        if not initial_variance > SMALLEST_VARIANCE:
            raise ValueError(f"initial_variance must be > {SMALLEST_VARIANCE}, got {initial_variance}")
        self.initial_variance = initial_variance
        self.needs = Needs.of_pairs(student_stages, teacher_stages)

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        ours, theirs = student.feature_shapes(), teacher.feature_shapes()
        pairs = zip(self.needs.student_stages, self.needs.teacher_stages, strict=True)
        self.players["predictors"] = nn.ModuleList(
            Predictor(ours[own][0], theirs[other][0], self.initial_variance) for own, other in pairs
        )

    def forward(self, view: View) -> Tensor:
        value = 0.0
        maps = zip(view.student_features, view.teacher_features, strict=True)
        for predictor, (ours, theirs) in zip(self.players["predictors"], maps, strict=True):
            size = [min(a, b) for a, b in zip(ours.shape[-2:], theirs.shape[-2:], strict=True)]
            mean, variance = predictor(adaptive_avg_pool2d(ours, size))
            value = value + vid_loss(mean, variance, adaptive_avg_pool2d(theirs, size), reduction="none")
        return value


class Predictor(nn.Module):
    """Mean and variance of the teacher's map, given the student's.

    Args:
        before: channels of the student's map.
        after: channels of the teacher's map.
        variance: of every channel at first.
    """

    def __init__(self, before: int, after: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(before, after, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(after, after, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(after, after, 1, bias=False),
        )
        start = variance - SMALLEST_VARIANCE
        self.scale = nn.Parameter(torch.full((after,), start + math.log(-math.expm1(-start))))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, after, H, W]` and `[after]`."""
        return self.mean(feature), softplus(self.scale) + SMALLEST_VARIANCE
