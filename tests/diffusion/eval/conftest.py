"""A generator whose law is known: noise images whose brightness is their class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.process import EDMProcess

CLASSES, SIZE = 4, (1, 8, 8)


def pixels(noise: Tensor, label: Tensor, contrast: float) -> Tensor:
    """`[B, C, H, W]` in [0, 1] from unit noise and labels."""
    brightness = (label.to(noise.dtype) + 0.5) / CLASSES
    return (brightness.view(-1, *(1,) * (noise.ndim - 1)) + contrast * noise).clamp(0, 1)


class Painter(nn.Module):
    """Denoises everything to `pixels` of its noise; dropout, so that train mode shows."""

    def __init__(self, contrast: float) -> None:
        super().__init__()
        self.contrast, self.dropout = nn.Parameter(torch.tensor(contrast)), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        label = torch.zeros(len(x), dtype=torch.int64) if condition is None else condition
        return self.dropout(pixels(x / 80, label, self.contrast) * 2 - 1)


@pytest.fixture
def make_generator() -> Callable[..., Generator]:
    """`make_generator(contrast, conditioned, shape)` of one step."""

    def make(contrast: float = 0.1, conditioned: bool = True, shape: tuple[int, ...] = SIZE) -> Generator:
        conditions = ClassLabels(CLASSES) if conditioned else None
        denoiser = Denoiser(Painter(contrast), EDMProcess(), "x0")
        return Generator(denoiser, shape, conditions=conditions, steps=1, sampler="student")

    return make


@pytest.fixture
def real_images() -> Callable[..., Tensor]:
    """`real_images(count, seed)` of the law that the generator makes by default, uint8."""

    def make(count: int = 400, seed: int = 1, contrast: float = 0.1) -> Tensor:
        noise = torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))
        return (pixels(noise, torch.arange(count) % CLASSES, contrast) * 255).round().to(torch.uint8)

    return make


@pytest.fixture
def by_brightness() -> nn.Module:
    """A classifier that knows the classes."""

    class ByBrightness(nn.Module):
        num_classes = CLASSES

        def forward(self, images: Tensor) -> Tensor:
            centres = (torch.arange(CLASSES, device=images.device) + 0.5) / CLASSES
            return -(images.mean((1, 2, 3))[:, None] - centres).abs()

    return ByBrightness()
