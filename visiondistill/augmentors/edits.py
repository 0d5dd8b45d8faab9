"""Images that a network changes, as much as it has learned to; nothing at first.

Networks of `Hard`. Each takes images `[B, C, H, W]` in [0, 1] by its own `encode`, noise from its own
`noise`, and for each image a partner, and gives changed images in [0, 1]. What it may do is bounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import Draw

MOVES = ("turn", "right", "down", "wide", "high", "shear")
NOISES = 4
"""Noise of `Affine`: so many numbers per image, each over the whole of it. White noise would average out in pooling."""


class Edit(nn.Module):
    """A learned change of images.

    Attributes:
        mixes: it puts a share of the partner into the image, whose label is then mixed as well.
        channels: of the images; None for any.
        frozen: networks that it only reads, by name.
    """

    mixes: bool = False
    channels: int | None = None

    def __init__(self) -> None:
        super().__init__()
        # A plain dict, so that they are no part of what is trained and saved.
        self.frozen: dict[str, nn.Module] = {}

    def encode(self, image: Tensor) -> Tensor:
        """What it reads of images, `[B, ...]`, whatever it has learned: asked once a step. By default themselves.

        Raises:
            SettingsError: images of other channels.
        """
        if self.channels not in (None, image.shape[1]):
            raise SettingsError(
                f"{type(self).__name__} is for images of {self.channels} channels, these have {image.shape[1]}: set "
                f"channels: {image.shape[1]}"
            )
        return image

    def noise(self, image: Tensor, draw: Draw, tag: str) -> Tensor:
        """What makes an answer differ from call to call, one row per image."""
        raise NotImplementedError(f"{type(self).__name__} must define noise()")

    def numbers(self, code: Tensor, noise: Tensor, partner: Tensor) -> Tensor:
        """What it decides for each image, `[B, ...]`, as shares of its bounds; `code` is what `encode` gave."""
        raise NotImplementedError(f"{type(self).__name__} must define numbers()")

    def forward(self, code: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Changed images, and the image's own share in each, `[B]` in [0, 1]; `code` is what `encode` gave."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class Moves(nn.Module):
    """Six numbers in [-1, 1] to an affine map, each scaled by its bound.

    Args:
        turn, shear: degrees.
        translation: share of the image's sides.
        scale: factor >= 1; sides are scaled by 1 / scale to scale.
    """

    def __init__(self, turn: float, translation: float, scale: float, shear: float) -> None:
        super().__init__()
        if not 0 <= turn <= 180 or not 0 <= shear < 90 or not 0 <= translation <= 1 or not scale >= 1:
            raise ValueError(
                f"need turn in [0, 180], shear in [0, 90), translation in [0, 1] and scale >= 1, "
                f"got {turn}, {shear}, {translation} and {scale}"
            )
        bounds = [math.radians(turn), translation, translation, math.log(scale), math.log(scale), math.radians(shear)]
        self.register_buffer("bounds", torch.tensor(bounds), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """`[B, 6]` to maps from output to input coordinates, `[B, 2, 3]`, as `affine_grid` takes them."""
        turn, right, down, wide, high, shear = (numbers * self.bounds).unbind(1)
        cos, sin, slant = turn.cos(), turn.sin(), shear.tan()
        wide, high = (-wide).exp(), (-high).exp()
        across = torch.stack([cos * wide, (cos * slant - sin) * high, -2 * right], 1)
        along = torch.stack([sin * wide, (sin * slant + cos) * high, -2 * down], 1)
        return torch.stack([across, along], 1)


class Affine(Edit):
    """Moves each image by what a small net reads in it and in channels of noise.

    The net's last layer is 0 at first: images stay as they are.

    Args:
        turn, translation, scale, shear: bounds; 0 (of `scale` 1) leaves a move out. Angles in degrees,
            translation as a share of the sides, scale as a factor.
        channels: of the images.
        width: of the net.
    """

    def __init__(
        self,
        turn: float = 30.0,
        translation: float = 0.25,
        scale: float = 1.25,
        shear: float = 15.0,
        channels: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.moves = Moves(turn, translation, scale, shear)
        self.net = nn.Sequential(
            nn.Conv2d(channels + NOISES, width, 3, stride=2, padding=1),
            nn.GroupNorm(1, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            zeroed(nn.Linear(8 * width, len(MOVES))),
        )

    def noise(self, image: Tensor, draw: Draw, tag: str) -> Tensor:
        return draw.normal(tag, NOISES)

    def forward(self, image: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        moved = moved_by(image, self.moves(self.numbers(image, noise, partner)))
        return moved, torch.ones_like(moved[:, 0, 0, 0])

    def numbers(self, image: Tensor, noise: Tensor, partner: Tensor) -> Tensor:
        """`[B, 6]` in [-1, 1], in the order of `MOVES`."""
        noise = noise.to(image.dtype)[:, :, None, None].expand(-1, -1, *image.shape[2:])
        return self.net(torch.cat([image, noise], 1)).tanh()


class AffineRange(Edit):
    """Moves each image at random, uniformly within ranges about 0 that are learned: a distribution, not an answer.

    A number is `bound * reach * u` with u uniform in [-1, 1) and `reach` = |tanh| of a parameter, so
    that the gradient goes through the sample. Ranges are common to all images and can only widen
    and narrow about the identity: what is reached is also covered.

    Args:
        turn, translation, scale, shear: bounds, as of `Affine`.
        start: share of each bound that the ranges reach at first, in [0, 1). From 0 they widen as fast as the
            rate lets them, and a short run is half over before they are wide.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        turn: float = 30.0,
        translation: float = 0.25,
        scale: float = 1.25,
        shear: float = 15.0,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= start < 1:
            raise ValueError(f"need start in [0, 1), got {start}: a share of the bounds")
        self.moves = Moves(turn, translation, scale, shear)
        self.width = nn.Parameter(torch.full((len(MOVES),), math.atanh(start)))

    def noise(self, image: Tensor, draw: Draw, tag: str) -> Tensor:
        return 2 * draw.uniform(tag, len(MOVES)) - 1

    def forward(self, image: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        moved = moved_by(image, self.moves(self.numbers(image, noise, partner)))
        return moved, torch.ones_like(moved[:, 0, 0, 0])

    def numbers(self, image: Tensor, noise: Tensor, partner: Tensor) -> Tensor:
        """`[B, 6]` in [-1, 1], in the order of `MOVES`."""
        return noise.to(image.dtype) * self.width.tanh()

    def reach(self) -> dict[str, float]:
        """The share of each bound that the ranges reach, by move, in [0, 1]."""
        return dict(zip(MOVES, self.width.detach().tanh().abs().tolist(), strict=True))


class Mask(Edit):
    """Puts parts of the partner into each image, where a mask of few cells says so.

    The partner's share in a cell is the net's answer z, cut to [0, most]; the gradient passes the
    cut as if it were not there, so that a cell can come back from 0. A sigmoid could not be 0 at
    first and learn.

    Args:
        most: greatest share of the partner in a pixel, in (0, 1].
        cells: of the mask, on each side; between their centres it is interpolated.
        channels: of the images.
        width: of the net.
    """

    mixes = True

    def __init__(self, most: float = 0.5, cells: int = 8, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if not 0 < most <= 1 or cells < 1:
            raise ValueError(f"need most in (0, 1] and cells >= 1, got {most} and {cells}")
        self.most, self.cells, self.channels = most, cells, channels
        self.net = nn.Sequential(
            nn.Conv2d(2 * channels + 1, width, 3, padding=1),
            nn.GroupNorm(1, width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(cells),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            zeroed(nn.Conv2d(width, 1, 1)),
        )

    def noise(self, image: Tensor, draw: Draw, tag: str) -> Tensor:
        return draw.normal(tag, 1, self.cells, self.cells)

    def numbers(self, image: Tensor, noise: Tensor, partner: Tensor) -> Tensor:
        """`[B, 1, cells, cells]` in [0, most]: the partner's share."""
        noise = functional.interpolate(noise.to(image.dtype), image.shape[2:])
        answer = self.net(torch.cat([image, partner, noise], 1))
        return answer + (answer.clamp(0, self.most) - answer).detach()

    def forward(self, image: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.numbers(image, noise, partner)
        share = functional.interpolate(cells, image.shape[2:], mode="bilinear", align_corners=False)
        return torch.lerp(image, partner, share), 1 - share.mean((1, 2, 3))


def moved_by(image: Tensor, maps: Tensor) -> Tensor:
    """`[B, C, H, W]` through affine maps `[B, 2, 3]` of output to input, with reflection outside."""
    height, width = image.shape[-2:]
    # In coordinates of [-1, 1] a turn of an oblong image would shear it.
    aspect = maps.new_tensor([[1.0, height / width, 1.0], [width / height, 1.0, 1.0]])
    grid = functional.affine_grid(maps * aspect, list(image.shape), align_corners=False)
    moved = functional.grid_sample(image, grid.to(image.dtype), padding_mode="reflection", align_corners=False)
    return moved.clamp(0, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias 0: what starts from it changes nothing, and learns."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
