"""Temporally adaptive interpolated distillation.

Shing, Misaki, Bao, Yokoi, Akiba: TAID: Temporally Adaptive Interpolated Distillation for Efficient
Knowledge Transfer in Language Models, ICLR 2025, arXiv 2501.16937.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from visiondistill.losses.common import Reduction, paired_logits, reduce


def taid_loss(
    student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy with `softmax((1 - t) s + t teacher)`, where s is a constant: logits are interpolated.

    The gradient is `p - target`, which is 0 at t = 0; the target's entropy is not subtracted.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        t: share of the teacher in [0, 1], a number or a 0-d tensor.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, a number t outside [0, 1], or unknown reduction.
    """
    if not isinstance(t, Tensor) and not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}")
    student, teacher = paired_logits(student_logits, teacher_logits)
    target = softmax((1 - t) * student.detach() + t * teacher, -1)
    return reduce(-(target * log_softmax(student, -1)).sum(-1), reduction)
