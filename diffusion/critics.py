"""Discriminators on a denoiser's features: what a diffusion GAN trains beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.losses.adversarial import KINDS
from diffusion.process import TimeLaw
from diffusion.tensors import choose

LAST_MAP = 4
"""Maps are halved while an axis is longer; what is left is one kernel."""
LEAST_GROUP = 4
"""Channels of a group at least. On a 1x1 map a group of one is 0, a group of two +-1, whatever came in."""


@dataclass(frozen=True)
class GAN:
    """An adversarial term on noised samples, judged by a head on a denoiser's features.

    Real and generated samples get noise and noise levels of their own.

    Args:
        features: of the "fake_score", which then learns from the term too, up to the last tap, as
            in DMD2; or of the frozen "teacher", where the head learns alone.
        taps: modules of that denoiser, see `Denoiser.features`; each has a head.
        generator_weight: of the term in the student's turn.
        critic_weight: of the term in the critic's turn.
        kind: of the losses.
        r1: weight of the critic's term (logit(x_t) - logit(x_t + 0.1*sigma(t)*noise))^2 on real
            samples, the finite difference of R1 at one noise level; 0 is off.
        times: law of the noise levels; default the process's own law, all of it.

    Raises:
        ValueError: unknown features or kind, no tap, or a negative weight.
    """

    features: Literal["fake_score", "teacher"] = "fake_score"
    taps: Sequence[str] = ("mid_block",)
    generator_weight: float = 3e-3
    critic_weight: float = 1e-2
    kind: Literal["softplus", "hinge", "relativistic"] = "softplus"
    r1: float = 0.0
    times: TimeLaw | None = None

    def __post_init__(self) -> None:
        choose("features", self.features, ("fake_score", "teacher"))
        choose("kind", self.kind, KINDS)
        if not self.taps or isinstance(self.taps, str):
            raise ValueError(f"taps={self.taps!r} is not allowed: a list of at least one module")
        if min(self.generator_weight, self.critic_weight, self.r1) < 0:
            raise ValueError("generator_weight, critic_weight and r1 must not be negative")


class Discriminator(nn.Module):
    """One head per tapped feature.

    Args:
        shapes: of the features of one sample: `[1, C]`, `[1, N, C]` (tokens), `[1, C, H, W]` or
            `[1, F, C, H, W]`; frames folded into the batch give `[F, C, H, W]`.

    Raises:
        ValueError: features of fewer than four channels.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(*as_maps(torch.empty(*shape, device="meta")).shape[1:]) for shape in shapes)

    def forward(self, features: Sequence[Tensor], rows: int) -> Tensor:
        """Logits `[rows, heads]`; every frame is a head of its own."""
        dtype = next(self.parameters()).dtype  # a frozen teacher in half precision gives features of its own
        maps = [as_maps(feature).to(dtype) for feature in features]
        return torch.cat([head(each).reshape(rows, -1) for head, each in zip(self.heads, maps, strict=True)], 1)


@torch.no_grad()
def discriminator_of(denoiser: Denoiser, taps: Sequence[str], x_t: Tensor, t: Tensor, condition: object) -> nn.Module:
    """A `Discriminator` for a denoiser's features, whose shapes are seen on one sample `x_t [1, ...]`."""
    training = denoiser.training
    denoiser.eval()
    _, features = denoiser.features(x_t, t, condition, taps=taps)
    denoiser.train(training)
    return Discriminator([feature.shape for feature in features]).to(x_t)


def as_maps(features: Tensor) -> Tensor:
    """Features of any network as `[rows, C, H, W]`; tokens `[B, N, C]` as a square where N is one."""
    if features.ndim == 2:
        return features[:, :, None, None]
    if features.ndim == 3:
        side = math.isqrt(features.shape[1])
        high = side if side * side == features.shape[1] else 1
        return features.mT.unflatten(2, (high, -1))
    if features.ndim == 5:
        return features.flatten(0, 1)
    if features.ndim == 4:
        return features
    raise ValueError(f"features of shape {tuple(features.shape)} are no maps: 2 to 5 dimensions")


def _head(channels: int, height: int, width: int) -> nn.Sequential:
    """Convolutions down to one logit; on 8x8 and 32x32 maps those of DMD2's release."""
    if channels < LEAST_GROUP:
        raise ValueError(f"features of {channels} channels are too few to judge: tap a layer of {LEAST_GROUP} or more")
    layers: list[nn.Module] = []
    while max(height, width) > LAST_MAP:
        kernel, stride, padding = zip(*((4, 2, 1) if n > LAST_MAP else (1, 1, 0) for n in (height, width)), strict=True)
        layers += _stage(nn.Conv2d(channels, channels, kernel, stride, padding))
        height, width = (n // 2 if n > LAST_MAP else n for n in (height, width))
    layers += _stage(nn.Conv2d(channels, channels, (height, width)))
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _stage(convolution: nn.Conv2d) -> list[nn.Module]:
    channels = convolution.out_channels
    most = min(32, channels // LEAST_GROUP)
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    return [convolution, nn.GroupNorm(groups, channels), nn.SiLU()]
