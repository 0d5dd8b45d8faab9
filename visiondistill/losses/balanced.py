"""Balanced divergences. A reconstruction: no official code was found, the constants are ours.

Amara, Sepahvand, Meyer, Gross, Clark: BD-KD: Balancing the Divergences for Online Knowledge Distillation,
arXiv 2212.12965.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce
from visiondistill.losses.kd import divergence

SAME_ENTROPY = 1e-5
"""Share of log K, the largest entropy, within which two entropies count as equal: far more than rounding makes."""


def balanced_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    delta: float = 2.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`CE + T^2 (w_f KL(q || p) + w_r KL(p || q))`, weighted row by row by who is the more confident.

    Where the student's entropy is below the teacher's, w_f = delta and w_r = 1: the forward divergence
    widens it. Where it is above, w_f = 1 and w_r = delta: the reverse one sharpens it. Where both are equal,
    up to rounding, w_f = w_r = (1 + delta) / 2, so that exchanging the two changes nothing. The weights
    are constants for the gradient, or the student could lower its loss by changing its entropy.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        target: `[B]` int64 in [0, K).
        delta: > 0; 1 gives the symmetric divergence.
        temperature: T > 0 of both divergences and of the entropies that are compared.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, delta <= 0, T <= 0 or unknown reduction.
    """
    if not delta > 0:
        raise ValueError(f"delta must be > 0, got {delta}")
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    log_p, log_q = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    tilt = (delta - 1) / 2 * _surer(log_p.detach(), log_q.detach())
    forward = ((1 + delta) / 2 + tilt) * divergence(log_q, log_p)
    backward = ((1 + delta) / 2 - tilt) * divergence(log_p, log_q)
    label = cross_entropy(student, target, reduction="none")
    return reduce(label + temperature**2 * (forward + backward), reduction)


def _surer(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`[B]`: 1 where p has the lower entropy, -1 where q has, 0 where they are equal."""
    gap = _entropy(log_q) - _entropy(log_p)
    return torch.where(gap.abs() <= SAME_ENTROPY * math.log(log_p.shape[-1]), 0.0, gap.sign())


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
