"""Relational knowledge distillation.

Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068, equations 5 to 9
(sections 3.2.1 and 3.2.2); means over all entries, and a gradient through the student's mean distance, as in the
released code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from visiondistill.losses.common import directions, lift

SMALLEST_SQUARE = 1e-12


def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Distances between pairs and angles in triples of a batch; a scalar, no value per row exists.

    Distances are divided by the mean of those that are not 0. Shifting, rotating or scaling either
    side's features changes nothing. Means are over all pairs and triples, trivial ones included; the
    angles take `B^3` values.

    Args:
        student_features, teacher_features: `[B, D]`, pooled; widths may differ.
        distance_weight, angle_weight: weights of the two parts; a part of weight 0 is not computed.

    Raises:
        ValueError: batch sizes differ, or features are not `[B, D]`.
    """
    if student_features.ndim != 2 or teacher_features.ndim != 2 or len(student_features) != len(teacher_features):
        raise ValueError(
            f"features must be [B, D] of one batch, got {tuple(student_features.shape)} and "
            f"{tuple(teacher_features.shape)}"
        )
    ours, theirs = _differences(lift(student_features)), _differences(lift(teacher_features))
    value = ours.new_zeros(())
    if distance_weight:
        value = value + distance_weight * smooth_l1_loss(_distances(ours), _distances(theirs))
    if angle_weight:
        value = value + angle_weight * smooth_l1_loss(_angles(ours), _angles(theirs))
    return value


def _differences(features: Tensor) -> Tensor:
    """`x_j - x_i` at `[i, j]`, `[B, B, D]`."""
    return features[None] - features[:, None]


def _distances(differences: Tensor) -> Tensor:
    """`[B, B]`, relative to their mean; 0 on the diagonal."""
    squares = differences.square().sum(2).clamp(min=SMALLEST_SQUARE)
    distances = squares.sqrt() * (1 - torch.eye(len(squares), dtype=squares.dtype, device=squares.device))
    return distances / (distances.sum() / (distances > 0).sum().clamp(min=1)).clamp(min=SMALLEST_SQUARE)


def _angles(differences: Tensor) -> Tensor:
    """Cosines `[B, B, B]` at vertex i between the directions to j and k."""
    towards = directions(differences)
    # Autocast would round cosines, whose differences are small.
    with torch.autocast(towards.device.type, enabled=False):
        return towards @ towards.mT
