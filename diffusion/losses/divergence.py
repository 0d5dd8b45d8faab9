"""f-distill: weights that turn DMD's reverse KL into other f-divergences (Xu et al. 2025, table 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.tensors import choose, lift, per_sample

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
    "hellinger": torch.sqrt,
}
"""h(r) = f''(r) * r^2 of the density ratio r = p_teacher/p_student, by divergence."""


@torch.no_grad()
def density_ratio(
    fake_logits: Tensor, *, logit_clip: float = 10.0, bounds: tuple[float, float] = (0.1, 20.0)
) -> Tensor:
    """p_data/p_student from a discriminator's logits on generated samples.

    Args:
        fake_logits: `[B]` or `[B, heads]`; heads are averaged before exponentiation.
        logit_clip: limit of the averaged logit's size.
        bounds: least and greatest ratio.

    Returns:
        `[B]`, float32, without a graph.
    """
    logit = per_sample(lift(fake_logits)).clamp(-logit_clip, logit_clip)
    return logit.exp().clamp(*bounds).float()


@torch.no_grad()
def update_bin_means(bin_means: Tensor, bin_index: Tensor, ratio: Tensor, decay: float) -> Tensor:
    """Running mean of the ratio per time bin; update it *before* dividing by it.

    Args:
        bin_means: `[bins]`, 1 at the start.
        bin_index: int64 `[B]`: floor((t - t_min)/(t_max - t_min)*bins), clamped to the bins.
        ratio: `[B]`, of the whole batch over all processes.
        decay: share of the old mean that stays.

    Returns:
        New `[bins]`; bins that do not occur keep their mean.
    """
    zeros = torch.zeros_like(bin_means)
    count = zeros.index_add(0, bin_index, torch.ones_like(ratio, dtype=zeros.dtype))
    total = zeros.index_add(0, bin_index, ratio.to(zeros.dtype))
    moved = decay * bin_means + (1 - decay) * total / count.clamp(min=1)
    return torch.where(count > 0, moved, bin_means)


@torch.no_grad()
def fdistill_weight(
    fake_logits: Tensor,
    divergence: str = "js",
    *,
    bin_mean: Tensor | None = None,
    logit_clip: float = 10.0,
    bounds: tuple[float, float] = (0.1, 20.0),
) -> Tensor:
    """Per-sample weight of the DMD field for an f-divergence, of mean 1 over the batch given.

    Args:
        fake_logits: `[B]` or `[B, heads]`; under several processes of the gathered batch, since the
            mean is the global one.
        divergence: a key of `WEIGHTS`; "rkl" gives ones, that is DMD.
        bin_mean: `[B]`, the running mean of each sample's time bin; None divides by nothing.

    Returns:
        `[B]`, float32, without a graph.

    Raises:
        ValueError: unknown divergence.
    """
    choose("divergence", divergence, tuple(WEIGHTS))
    ratio = density_ratio(fake_logits, logit_clip=logit_clip, bounds=bounds)
    weight = WEIGHTS[divergence](ratio if bin_mean is None else ratio / bin_mean.float())
    return weight / weight.mean()
