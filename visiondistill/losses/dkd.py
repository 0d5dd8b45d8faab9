"""Decoupled knowledge distillation.

Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679, equation 7.
The released code takes 1000 off the target's logit; here its column is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from visiondistill.losses.common import Reduction, check_labels, paired_logits, positive_temperature, reduce
from visiondistill.losses.kd import divergence


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`T^2 (alpha TCKD + beta NCKD)`: the target class against the rest, and the rest among themselves.

    Per row `kd_loss = T^2 (TCKD + (1 - q_target) NCKD)`; a fixed beta undoes the damping that a
    confident teacher puts on its dark knowledge.

    Args:
        student_logits, teacher_logits: `[B, K]`, K >= 2.
        target: `[B]` int64 in [0, K).
        alpha, beta: weights of the target-class and the non-target-class part.
        temperature: T > 0, divides both logits.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, K < 2, T <= 0 or unknown reduction.
    """
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    check_labels(target, student)
    if student.shape[1] < 2:
        raise ValueError(f"dkd_loss needs at least 2 classes, got logits {tuple(student.shape)}")
    others = _other_classes(target, student.shape[1])
    binary_p, rest_p = _decouple(student / temperature, target, others)
    binary_q, rest_q = _decouple(teacher / temperature, target, others)
    values = alpha * divergence(binary_q, binary_p) + beta * divergence(rest_q, rest_p)
    return reduce(temperature**2 * values, reduction)


def _other_classes(target: Tensor, num_classes: int) -> Tensor:
    """`[B, K-1]`: all classes but the target, in order."""
    rank = torch.arange(num_classes - 1, device=target.device)
    return rank + (rank >= target[:, None]).long()


def _decouple(logits: Tensor, target: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (target, not target) `[B, 2]` and of the other classes among themselves `[B, K-1]`."""
    log_p = log_softmax(logits, -1)
    # Dropping the target's column, not masking it, keeps -inf and arbitrary large constants out.
    log_rest = log_p.gather(1, others)
    log_not_target = log_rest.logsumexp(1, keepdim=True)
    binary = torch.cat((log_p.gather(1, target[:, None]), log_not_target), 1)
    return binary, log_rest - log_not_target
