"""The toy's network."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser, EDMPreconditioner
from diffusion.process import EDMProcess


class MLP(nn.Module):
    """SiLU layers on a point and its noise level.

    Args:
        dim: of a point.
        width: of a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, dim: int = 2, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        widths = [dim + 1] + [width] * depth
        hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, condition: None = None) -> Tensor:
        """`x [B, dim]`, `t [B]` -> `[B, dim]`."""
        return self.layers(torch.cat([x, t.to(x.dtype).unsqueeze(1)], 1))


def toy_denoiser(width: int = 128, depth: int = 3) -> Denoiser:
    """An `MLP` with EDM preconditioning on the EDM path."""
    return Denoiser(EDMPreconditioner(MLP(width=width, depth=depth)), EDMProcess(), "x0")
