"""Logit standardisation.

Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427, algorithm 1.
The released code's gradient of a constant row is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visiondistill.losses.common import lift


def standardize_logits(logits: Tensor) -> Tensor:
    """Z-score of each row with the unbiased standard deviation, `[..., K] -> [..., K]`.

    Apply it to student and teacher before any loss on logits; the loss then ignores shift and
    scale of a row. A constant row gives zeros; its derivative there is 1e7, which float16 cannot hold.

    Args:
        logits: `[..., K]`, K >= 2.

    Raises:
        ValueError: K < 2.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"standardize_logits needs at least 2 classes, got logits {tuple(logits.shape)}")
    logits = lift(logits)
    # Exact for a constant row, whose mean need not equal its elements once rounded.
    logits = logits - logits.amax(-1, keepdim=True).detach()
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (logits.shape[-1] - 1)
    # The square root has no derivative at 0; without the detour a constant row has NaN gradients.
    constant = variance == 0
    deviation = torch.where(constant, 1.0, variance).sqrt().masked_fill(constant, 0.0)
    return centred / (deviation + 1e-7)
