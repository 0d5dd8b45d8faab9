"""Classical augmentation on the device, another draw for every image."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw
from visiondistill.parts import Part

TRAIN = "train"
RATIO = math.log(4 / 3)
"""Crops have width / height between 3/4 and 4/3 of the image's."""
ERASED = (0.02, 0.33)
"""Least and greatest share of the area that `erase` covers."""

Padding = Literal["constant", "reflect", "replicate"]


class Augment(Part):
    """Mirror, shift, zoom, turn, change colours, erase: in this order, each image on its own.

    A pure function of (seed, step, row): independent of processes, micro-batches and workers.
    Strengths of 0 leave their step out; an image that nothing touches passes bit by bit. What was
    done is in `batch["train"]["view"]`: "flip" bool `[B]`, "shift" int64 `[B, 2]` (down, right),
    "zoom" `[B, 2, 3]` (output to input coordinates in [-1, 1], as `affine_grid` takes them).

    Args:
        flip: probability of a mirror image, in [0, 1].
        shift: greatest shift in whole pixels, in each direction, with `padding` outside; the usual
            CIFAR crop is 4.
        shift_probability: that an image is shifted at all, in [0, 1].
        padding: what lies outside a shifted image: "constant" (black), "reflect" or "replicate".
        zoom: least share of the area that a random crop, enlarged to the image, keeps, in (0, 1];
            1 leaves it out. Area and logarithm of the ratio are uniform, sides end at the image's.
        turn: greatest angle in degrees, in [0, 180], with reflection outside.
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - s), 1 + s], s >= 0;
            the factors mean what they do in torchvision.
        hue: shift in turns of the colour circle, uniform in [-hue, hue], hue in [0, 0.5].
        erase: probability that a rectangle of 2 to 33 % of the area gets the image's mean colour.

    Raises:
        SettingsError: a strength outside its range.
    """

    def __init__(
        self,
        flip: float = 0.5,
        shift: int = 0,
        shift_probability: float = 1.0,
        padding: Padding = "constant",
        zoom: float = 1.0,
        turn: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        erase: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"flip": flip, "shift_probability": shift_probability, "erase": erase}.items():
            _require(0 <= value <= 1, name, value, "a probability in [0, 1]")
        for name, value in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
            _require(0 <= value < math.inf, name, value, "a number >= 0")
        _require(shift >= 0, "shift", shift, "pixels >= 0")
        _require(padding in ("constant", "reflect", "replicate"), "padding", padding, "constant, reflect or replicate")
        _require(0 < zoom <= 1, "zoom", zoom, "in (0, 1]; 1 leaves it out")
        _require(0 <= turn <= 180, "turn", turn, "degrees in [0, 180]")
        _require(0 <= hue <= 0.5, "hue", hue, "in [0, 0.5]")
        self.flip, self.shift, self.padding, self.zoom, self.turn = flip, shift, padding, zoom, turn
        self.shift_probability = shift_probability
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.erase = erase
        strengths = {"flip": flip, "shift": shift, "zoom": zoom < 1, "turn": turn, "brightness": brightness}
        strengths |= {"contrast": contrast, "saturation": saturation, "hue": hue, "erase": erase}
        self.views = frozenset(name for name, strength in strengths.items() if strength)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        data, draw = batch[TRAIN], draw.of(TRAIN)
        # Autocast would round pixels where kornia multiplies matrices.
        with torch.autocast(data["image"].device.type, enabled=False):
            image, view = self._placed(data["image"], draw)
            image = self._erased(self._coloured(image, draw), draw)
        return batch | {TRAIN: data | {"image": image, "view": data.get("view", {}) | view}}

    def _placed(self, image: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        view: dict[str, Tensor] = {}
        if self.flip:
            view["flip"] = draw.uniform("augment.flip") < self.flip
            image = flipped(image, view["flip"])
        if self.shift:
            by = draw.integers("augment.shift", -self.shift, self.shift + 1, 2)
            view["shift"] = by * (draw.uniform("augment.shifts") < self.shift_probability)[:, None]
            image = shifted(image, view["shift"], self.shift, self.padding)
        if self.zoom < 1 or self.turn:
            view["zoom"] = self._zoom(image, draw)
            image = zoomed(image, view["zoom"])
        return image, view

    def _zoom(self, image: Tensor, draw: Draw) -> Tensor:
        share, ratio, right, down, angle = draw.uniform("augment.zoom", 5).unbind(1)
        area = self.zoom + (1 - self.zoom) * share
        stretch = torch.exp(RATIO * (ratio - 0.5)) if self.zoom < 1 else torch.ones_like(ratio)
        width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        angle = math.radians(self.turn) * (2 * angle - 1)
        aspect = image.shape[-2] / image.shape[-1]
        across = torch.stack([width * angle.cos(), -height * angle.sin() * aspect, (1 - width) * (2 * right - 1)], 1)
        along = torch.stack([width * angle.sin() / aspect, height * angle.cos(), (1 - height) * (2 * down - 1)], 1)
        return torch.stack([across, along], 1).to(image.dtype)

    def _coloured(self, image: Tensor, draw: Draw) -> Tensor:
        if (self.saturation or self.hue) and image.shape[1] != 3:
            raise SettingsError(f"saturation and hue need 3 channels, the images have {image.shape[1]}: set both to 0")
        if self.brightness:
            image = (image * _factor("brightness", self.brightness, draw).to(image.dtype)).clamp(0, 1)
        if self.contrast:
            from kornia.enhance import adjust_contrast_with_mean_subtraction

            image = adjust_contrast_with_mean_subtraction(image, _factor("contrast", self.contrast, draw))
        if self.saturation:
            from kornia.enhance import adjust_saturation_with_gray_subtraction

            image = adjust_saturation_with_gray_subtraction(image, _factor("saturation", self.saturation, draw))
        if self.hue:
            from kornia.enhance import adjust_hue

            image = adjust_hue(image, 2 * math.pi * self.hue * (2 * draw.uniform("augment.hue") - 1)).clamp(0, 1)
        return image

    def _erased(self, image: Tensor, draw: Draw) -> Tensor:
        if not self.erase:
            return image
        chance, share, ratio, right, down = draw.uniform("augment.erase", 5).unbind(1)
        area = ERASED[0] + (ERASED[1] - ERASED[0]) * share
        stretch = torch.exp(RATIO * (ratio - 0.5))
        box = inside(image, area.sqrt() / stretch, area.sqrt() * stretch, down, right)
        covered = box & (chance < self.erase)[:, None, None, None]
        return torch.where(covered, image.mean((-2, -1), keepdim=True), image)


def flipped(image: Tensor, flip: Tensor) -> Tensor:
    """Rows of `[B, C, H, W]` mirrored left to right where `flip` `[B]` is true."""
    return torch.where(flip[:, None, None, None], image.flip(-1), image)


def shifted(image: Tensor, by: Tensor, most: int, padding: Padding = "constant") -> Tensor:
    """`[B, C, H, W]` moved by whole pixels, `[B, 2]` (down, right) in [-most, most]."""
    height, width = image.shape[-2:]
    padded = functional.pad(image, (most,) * 4, mode=padding)
    rows = torch.arange(height, device=image.device) + most - by[:, :1]
    columns = torch.arange(width, device=image.device) + most - by[:, 1:]
    each = torch.arange(len(image), device=image.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def zoomed(image: Tensor, zoom: Tensor) -> Tensor:
    """`[B, C, H, W]` through affine maps `[B, 2, 3]` from output to input, with reflection outside."""
    grid = functional.affine_grid(zoom, list(image.shape), align_corners=False)
    return functional.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


def inside(image: Tensor, height: Tensor, width: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Bool `[B, 1, H, W]`: pixels in boxes that lie whole in the image.

    Args:
        height, width: shares of the image's sides, `[B]`.
        down, right: where, in [0, 1), `[B]`: every place that there is equally likely.
    """
    rows, columns = _within(image.shape[-2], height, down), _within(image.shape[-1], width, right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def _within(length: int, share: Tensor, place: Tensor) -> Tensor:
    size = (share * length).round().clamp(0, length)
    start = (place * (length - size + 1)).floor()
    at = torch.arange(length, device=share.device)
    return (at >= start[:, None]) & (at < (start + size)[:, None])


def _factor(name: str, strength: float, draw: Draw) -> Tensor:
    """`[B, 1, 1, 1]`."""
    low, high = max(0.0, 1 - strength), 1 + strength
    return (low + (high - low) * draw.uniform(f"augment.{name}"))[:, None, None, None]


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise SettingsError(f"{name}={value!r} is not allowed: it must be {allowed}")
