"""Plackett-Luce distillation.

Bassam, Zhu, Bian: PLD: A Choice-Theoretic List-Wise Knowledge Distillation, NeurIPS 2025, arXiv 2506.12542,
sections 4.1 and 4.2. No code was released; the paper's appendix lists the loss.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softmax

from visiondistill.losses.common import Reduction, check_labels, paired_logits, positive_temperature, reduce


def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`sum_k a_k (logsumexp_{j >= k} s_{pi_j} - s_{pi_k})`: the label, then the classes as the teacher ranks them.

    Each choice is weighted by the teacher's probability `a_k` of the class that it picks. It stands
    alone: with a teacher sure of the label it is cross-entropy. It has no minimum at finite logits.

    Args:
        student_logits, teacher_logits: `[B, K]`. The student's are divided by no temperature.
        target: `[B]` int64 in [0, K).
        temperature: T > 0 of the teacher's probabilities; the ranking does not depend on it.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, T <= 0 or unknown reduction.
    """
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    check_labels(target, student)
    ranks = teacher.detach().scatter(1, target[:, None], float("inf"))
    order = ranks.argsort(dim=1, descending=True, stable=True)
    weight = softmax(teacher / temperature, -1).gather(1, order)
    chosen = student.gather(1, order)
    remaining = chosen.flip(1).logcumsumexp(1).flip(1)
    return reduce((weight * (remaining - chosen)).sum(1), reduction)
