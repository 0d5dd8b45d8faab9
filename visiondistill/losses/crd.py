"""Contrastive representation distillation.

Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020, arXiv 1910.10699, equation 10 with
the critic of equation 19; noise-contrastive estimation with a fixed normaliser, as in the released code.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from visiondistill.losses.common import Reduction, lift, positive_temperature, reduce

EPSILON = 1e-7


def crd_loss(
    similarity: Tensor,
    normalizer: Tensor,
    samples: int,
    temperature: float = 0.07,
    reduction: Reduction = "mean",
) -> Tensor:
    """One side's loss: tell the pair of one image from m pairs of different ones.

    With `o = exp(similarity / T) / Z` and `c = m / N + 1e-7`:
    `-log(o_0 / (o_0 + c)) - sum_j log((m / N) / (o_j + c))`.

    Args:
        similarity: `[B, 1 + m]`, inner products of unit vectors: the pair first, then the others.
        normalizer: Z > 0, a scalar; a constant, so that it should have no gradient.
        samples: N, images in the training set.
        temperature: T > 0.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: no negative, samples < 1, T <= 0 or unknown reduction.
    """
    positive_temperature(temperature)
    if similarity.ndim != 2 or similarity.shape[1] < 2 or samples < 1:
        raise ValueError(
            f"similarity must be [B, 1 + m] with m >= 1 of samples >= 1, got {tuple(similarity.shape)} of {samples}"
        )
    noise = (similarity.shape[1] - 1) / samples
    threshold = math.log(noise + EPSILON)
    margin = lift(similarity) / temperature - lift(normalizer).log() - threshold
    others = logsigmoid(-margin[:, 1:]) + (math.log(noise) - threshold)
    return reduce(-(logsigmoid(margin[:, 0]) + others.sum(1)), reduction)
