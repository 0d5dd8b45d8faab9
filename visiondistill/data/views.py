"""How an image gets the size of its batch: the same way for every look in evaluation, at random in training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["bilinear", "bicubic"]
TRIES = 10
"""Draws of a crop before the middle of the image is taken, as torchvision does."""


class CenterView:
    """Resize the shorter side to `size / crop_pct`, then cut the middle: timm's evaluation, pixel for pixel.

    Args:
        size: height and width that come out.
        crop_pct: share of the resized image's shorter side that is kept, in (0, 1].
        interpolation: of the resizing, with antialiasing.
    """

    def __init__(self, size: int, crop_pct: float = 0.875, interpolation: Interpolation = "bicubic") -> None:
        self.size, self.shorter, self.interpolation = size, math.floor(size / crop_pct), interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms.v2 import functional

        mode = functional.InterpolationMode(self.interpolation)
        return functional.center_crop(functional.resize(image, [self.shorter], mode), [self.size, self.size])


class RandomView:
    """A random crop resized to `size`, mirrored with some probability: a pure function of the generator.

    Args:
        size: `(height, width)` that comes out.
        area: least share of the image's area that a crop keeps, in (0, 1]; the greatest is 1.
        ratio: least and greatest width / height of a crop.
        flip: probability of a mirror image, in [0, 1].
        interpolation: of the resizing, with antialiasing.
    """

    def __init__(
        self,
        size: tuple[int, int],
        area: float = 0.08,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.size, self.area, self.ratio, self.flip, self.interpolation = size, area, ratio, flip, interpolation

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        from torchvision.transforms.v2 import functional

        box = self.box(image.height, image.width, generator)
        mode = functional.InterpolationMode(self.interpolation)
        cut = functional.resized_crop(image, *box, list(self.size), mode)
        return functional.horizontal_flip(cut) if torch.rand((), generator=generator) < self.flip else cut

    def box(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """`(top, left, height, width)` of a crop: area uniform, logarithm of the ratio uniform."""
        low, high = (math.log(end) for end in self.ratio)
        for share, log_ratio, down, right in torch.rand(TRIES, 4, generator=generator, dtype=torch.float64).tolist():
            area = height * width * (self.area + (1 - self.area) * share)
            ratio = math.exp(low + (high - low) * log_ratio)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        return self._middle(height, width)

    def _middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, h, w
