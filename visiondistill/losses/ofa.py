"""Target-enhanced cross-entropy of One-for-All distillation.

Hao, Guo, Han, Tang, Hu, Wang, Xu: One-for-All: Bridge the Gap Between Heterogeneous Architectures in
Knowledge Distillation, NeurIPS 2023, arXiv 2310.19444; the exponent as in the released code, whose logarithm
of a softmax is infinite where a probability underflows: here it is a log-softmax.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softmax

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce


def ofa_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float = 1.0,
    temperature: float = 1.0,
    nontarget_power: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """`-sum_k w_k log p_k` with `w_k = (q_k + m_k)^gamma - m_k`, m one-hot of the label.

    At gamma = 1 its gradient is that of KL(q || p), its value larger by the teacher's entropy: it is not
    0 at equality. The gradient is `(sum(w) p - w) / T` per row; there is no factor T^2.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        target: `[B]` int64 in [0, K).
        gamma: exponent > 0; above 1 it raises the target's weight and lowers the others'.
        temperature: T > 0, divides both logits.
        nontarget_power: the released code raises every class to gamma; False leaves the others at q_k.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, gamma <= 0, T <= 0 or unknown reduction.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    q = softmax(teacher / temperature, -1)
    target_mask = one_hot(target, q.shape[1]).to(q.dtype)
    weight = (q + target_mask) ** gamma - target_mask
    if not nontarget_power:
        weight = target_mask * weight + (1 - target_mask) * q
    return reduce(-(weight * log_softmax(student / temperature, -1)).sum(-1), reduction)
