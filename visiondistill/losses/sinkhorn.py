"""Optimal transport between the predictions of a batch.

Cui, Qin, Gao, Zhang, Xu, Wu, Li, Sun, Zhou, Li: Sinkhorn Distance Minimization for Knowledge Distillation,
COLING 2024, arXiv 2402.17110. The released code ignores its temperature for the fixed 2, iterates on exponentials,
which underflow for an epsilon below 0.003, and has a factor of 0.001 within: here that is the term's weight.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softmax

from visiondistill.losses.common import paired_logits, positive_temperature


def sinkhorn_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    num_iters: int = 20,
) -> Tensor:
    """`sum P * C`: C the L1 distances of the student's rows of probabilities to the teacher's, P a transport plan.

    The plan has unit columns (mass B), so the value grows with the batch; the released scripts weight
    it with 0.0008. Gradients flow through the cost and through every iteration. At equality it is
    small, not 0, for a plan that is not sharp. A scalar: no value per row exists.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        temperature: T > 0, divides both logits.
        epsilon: of the entropic regularisation, > 0; computed in log space, so that it may be small.
        num_iters: normalisations of rows and columns, >= 1.

    Raises:
        ValueError: shapes differ, or a number outside its range.
    """
    positive_temperature(temperature)
    if not epsilon > 0 or num_iters < 1:
        raise ValueError(f"need epsilon > 0 and num_iters >= 1, got {epsilon} and {num_iters}")
    student, teacher = paired_logits(student_logits, teacher_logits)
    p, q = softmax(student / temperature, -1), softmax(teacher / temperature, -1)
    cost = (p[:, None] - q[None]).abs().sum(-1)
    plan = -cost / epsilon
    for _ in range(num_iters):
        plan = plan.log_softmax(1)
        plan = plan.log_softmax(0)
    return (plan.exp() * cost).sum()
