"""Grids and laws of time, free of any network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.tensors import choose

LAWS = ("uniform", "index", "karras", "lognormal", "logit_normal", "shifted")


def shift_time(t: Tensor | float, shift: float) -> Tensor | float:
    """Move times on [0, 1] towards the noise end: s*t / (1 + (s-1)*t), the identity at shift 1.

    Source: Esser et al. 2024 (SD3), equation 23.
    """
    return shift * t / (1 + (shift - 1) * t)


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels spaced evenly in sigma^(1/rho), **ascending**, float64 `[n]`; n=1 gives sigma_max.

    Source: Karras et al. 2022 (EDM), equation 5.

    Raises:
        ValueError: n < 1, or not 0 < sigma_min < sigma_max.
    """
    if n < 1:
        raise ValueError(f"n={n} is not allowed: at least 1 noise level")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
    # From the top, so that a single level is the highest.
    ramp = torch.linspace(1, 0, n, dtype=torch.float64).flip(0)
    return _power_ramp(ramp, sigma_min, sigma_max, rho)


def time_quantile(
    u: Tensor,
    law: str = "uniform",
    *,
    low: float = 0.0,
    high: float | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    rho: float = 7.0,
) -> Tensor:
    """Map uniform draws to times by the law's inverse distribution function.

    Args:
        u: draws in [0, 1), any shape.
        law:
            "uniform": low + u*(high-low).
            "index": integers low ... high, both included (DMD2's score: 20 ... 980).
            "karras": uniform in t^(1/rho) (SiD multiplies u by 0.8).
            "lognormal": exp(N(mean, std^2)), truncated to [low, high] (EDM: -1.2 and 1.2).
            "logit_normal": sigmoid(N(mean, std^2)), squeezed to [low, high] (SD3).
            "shifted": `shift_time` of "uniform", then clamped to [low, high] (Wan).
        high: None is 1, or infinity for "lognormal".

    Returns:
        Times of u's shape, float64 (int64 for "index").

    Raises:
        ValueError: unknown law, or low > high.
    """
    choose("law", law, LAWS)
    high = (float("inf") if law == "lognormal" else 1.0) if high is None else high
    if low > high:
        raise ValueError(f"low={low} is not allowed: it must not exceed high={high}")
    u = u.double()
    if law == "index":
        return (low + torch.floor(u * (high - low + 1))).clamp(max=high).long()
    if law == "karras":
        return _power_ramp(u, low, high, rho)
    if law == "lognormal":
        return _truncated_lognormal(u, low, high, mean, std)
    if law == "logit_normal":
        return low + torch.sigmoid(mean + std * torch.special.ndtri(u)) * (high - low)
    t = low + u * (high - low)
    return t if law == "uniform" else shift_time(t, shift).clamp(low, high)


@dataclass(frozen=True)
class TimeLaw:
    """`time_quantile` with its arguments bound, as a setting: `law(u)` gives times."""

    law: str = "uniform"
    low: float = 0.0
    high: float | None = None
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        self(torch.zeros(0))

    def __call__(self, u: Tensor) -> Tensor:
        return time_quantile(
            u, self.law, low=self.low, high=self.high, mean=self.mean, std=self.std, shift=self.shift, rho=self.rho
        )


def block_times(t: Tensor, block_size: int = 3, independent_first: bool = False) -> Tensor:
    """Give every frame the time of its block's first frame, `[B, F] -> [B, F]`.

    Args:
        block_size: frames per block; the last block may be shorter.
        independent_first: the first frame is a block of its own (layout 1, 3, 3, ...).

    Raises:
        ValueError: block_size < 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size} is not allowed: at least 1 frame")
    frame = torch.arange(t.shape[1], device=t.device)
    offset = int(independent_first)
    first = torch.where(frame < offset, frame, (frame - offset) // block_size * block_size + offset)
    return t[:, first]


def _power_ramp(u: Tensor, low: float, high: float, rho: float) -> Tensor:
    a, b = low ** (1 / rho), high ** (1 / rho)
    return (a + u * (b - a)) ** rho


def _truncated_lognormal(u: Tensor, low: float, high: float, mean: float, std: float) -> Tensor:
    low_mass, high_mass = (_normal_mass(((math.log(x) if x > 0 else -math.inf) - mean) / std) for x in (low, high))
    return torch.exp(mean + std * torch.special.ndtri(low_mass + u * (high_mass - low_mass))).clamp(low, high)


def _normal_mass(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
