"""Normalised knowledge distillation.

Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce
from visiondistill.terms.base import Needs, Term, View


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropies with the teacher on the target class, and on the other classes among themselves.

    `-q_y log p_y - gamma T^2 sum_{i != y} q'_i log p'_i`, where p' and q' are the softmax of the other
    classes' logits over T: both sum to 1, which those classes' shares of p and q do not. As of
    cross-entropies, the smallest value is not 0.

    Args:
        student_logits, teacher_logits: `[B, K]`, K >= 2.
        target: y, `[B]` int64 in [0, K).
        gamma: weight of the other classes.
        temperature: T > 0, of the other classes alone.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, K < 2, T <= 0 or unknown reduction.
    """
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    if student.shape[1] < 2:
        raise ValueError(f"nkd_loss needs at least 2 classes, got logits {tuple(student.shape)}")
    log_p, log_q = (log_softmax(logits, -1).gather(1, target[:, None])[:, 0] for logits in (student, teacher))
    is_target = one_hot(target, student.shape[1]).bool()
    log_rest_p, log_rest_q = (_log_rest(logits / temperature, is_target) for logits in (student, teacher))
    values = -log_q.exp() * log_p - gamma * temperature**2 * (log_rest_q.exp() * log_rest_p).sum(1)
    return reduce(values, reduction)


def _log_rest(logits: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities `[B, K]` of the other classes among themselves; 0 at the target, where it adds nothing."""
    return log_softmax(logits.masked_fill(is_target, -math.inf), -1).masked_fill(is_target, 0.0)


class NKD(Term):
    """The teacher's probability of the label, and its preferences among the other classes; a mean over labelled images.

    Args:
        gamma: weight of the other classes.
        temperature: T > 0, divides both logits of the other classes.
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, head: str = "main") -> None:
        super().__init__()
        self.gamma, self.temperature = gamma, positive_temperature(temperature)
        self.needs = Needs(head=head, label=True, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        return nkd_loss(view.logits, view.teacher_logits, view.label, self.gamma, self.temperature, reduction="none")
