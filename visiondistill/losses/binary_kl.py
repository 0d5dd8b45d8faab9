"""Divergences of logits, class by class.

Yang, Zong, Huang, Feng, An: Dual-Head Knowledge Distillation, KDD 2025, arXiv 2411.08937: BinaryKL and
BinaryKL-Norm, the latter in closed form. The released code clamps probabilities to [1e-8, 1 - 1e-8] instead, which
stops the gradient of logits, or of their difference, beyond 18.4 T.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from visiondistill.losses.common import Reduction, paired_logits, positive_temperature, reduce


def binary_kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, reduction: Reduction = "mean"
) -> Tensor:
    """`T^2 sum_k KL(Bernoulli(sigmoid(t_k / T)) || Bernoulli(sigmoid(s_k / T)))`.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        temperature: T > 0, divides both logits.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ, T <= 0 or unknown reduction.
    """
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    s, t = student / temperature, teacher / temperature
    yes = t.sigmoid() * (logsigmoid(t) - logsigmoid(s))
    no = (-t).sigmoid() * (logsigmoid(-t) - logsigmoid(-s))
    return reduce(temperature**2 * (yes + no).sum(-1), reduction)


def binary_kl_norm_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, reduction: Reduction = "mean"
) -> Tensor:
    """`T^2 sum_k log cosh((s_k - t_k) / (2 T))`, which is KL(Bernoulli(1/2) || Bernoulli(sigmoid((s_k - t_k) / T))).

    A regression of raw logits: quadratic near equality, linear far away, with gradients within
    `T / 2` an entry. A constant added to a row of logits does change it.

    Arguments and errors as in `binary_kl_loss`.
    """
    positive_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    half = (student - teacher) / (2 * temperature)
    return reduce(temperature**2 * (-logsigmoid(-2 * half) - half - math.log(2)).sum(-1), reduction)
