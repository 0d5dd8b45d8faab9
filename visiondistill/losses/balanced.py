"""Balanced divergences. A reconstruction: no official code was found, the constants are ours.

Amara, Sepahvand, Meyer, Gross, Clark: BD-KD: Balancing the Divergences for Online Knowledge Distillation,
arXiv 2212.12965.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce
from visiondistill.losses.kd import divergence


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
    widens it. Elsewhere w_f = 1 and w_r = delta: the reverse one sharpens it. The weights are
    constants for the gradient, or the student could lower its loss by changing its entropy.

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
    confident = (_entropy(log_p) < _entropy(log_q)).detach()
    forward = torch.where(confident, delta, 1.0) * divergence(log_q, log_p)
    backward = torch.where(confident, 1.0, delta) * divergence(log_p, log_q)
    label = cross_entropy(student, target, reduction="none")
    return reduce(label + temperature**2 * (forward + backward), reduction)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
