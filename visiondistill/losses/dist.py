"""Distillation from a stronger teacher by correlation.

Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
arXiv 2205.10536, equations 8 to 10.
"""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import softmax

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`T^2 (beta (1 - rho_rows) + gamma (1 - rho_columns))`, rho = Pearson correlation of probabilities.

    Rows relate the classes of one image, columns the images of one class. 1e-8 is added to the
    product of norms as in the released code, so equal inputs give about 1e-8 to 1e-2, not 0. A
    batch of one row has no column correlation: that part is then `T^2 gamma` without gradient.

    Args:
        student_logits, teacher_logits: `[B, K]`; the column part is a function of the whole batch.
        beta, gamma: weights of the row and the column part.
        temperature: T > 0, divides both logits.
        reduction: "mean", or "none" for `[B]`, which needs `gamma=0`.

    Raises:
        ValueError: shapes differ, T <= 0, unknown reduction, or "none" with a column part.
    """
    if reduction == "none" and gamma != 0:
        raise ValueError("dist_loss has no value per row unless gamma=0: its column part needs the whole batch")
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    p, q = softmax(student / temperature, -1), softmax(teacher / temperature, -1)
    value = beta * reduce(1 - _pearson(p, q), reduction)
    if gamma != 0:
        value = value + gamma * (1 - _pearson(p.T, q.T)).mean()
    return temperature**2 * value


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of `a` with the same row of `b`, `[N, M] -> [N]`."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (vector_norm(a, dim=1) * vector_norm(b, dim=1) + 1e-8)
