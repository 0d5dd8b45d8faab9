"""Knowledge distillation on softened probabilities.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2: probabilities as in
equation 1, and the factor T^2.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, reduction: Reduction = "mean"
) -> Tensor:
    """Forward divergence `T^2 KL(teacher || student)`, summed over classes.

    The gradient for the student is `T (p - q)` per row, so that its size hardly depends on T.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        temperature: T > 0, divides both logits.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, T <= 0 or unknown reduction.
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, temperature)
    return reduce(temperature**2 * divergence(log_q, log_p), reduction)


def reverse_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, reduction: Reduction = "mean"
) -> Tensor:
    """Reverse divergence `T^2 KL(student || teacher)`, summed over classes: mode seeking.

    Arguments and errors as in `kd_loss`, with which it shares the limit of a small difference.
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, temperature)
    return reduce(temperature**2 * divergence(log_p, log_q), reduction)


def divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`KL(a || b)` of log-probabilities `[..., K]`, summed over the last dimension."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    return log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
