"""What all sources of image files share: sizes, views, memory, and what becomes of files that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visiondistill.data.origin import Origin
from visiondistill.data.pictures import Pictures
from visiondistill.data.source import TRAIN, Source, Split
from visiondistill.data.survey import Budget, Encoded, Look, Skipped, check_quota, skipped, survey
from visiondistill.data.tensors import TensorData
from visiondistill.data.views import CenterView, Interpolation, RandomView
from visiondistill.engine.errors import SettingsError

MEMORY_BYTES = 2**29
"""Sets of so many bytes of pixels, all splits together, are held decoded where nobody says otherwise."""

DEFAULT_SIZE = 224
"""Height and width of images that differ in size, where nobody says otherwise."""


@dataclass(frozen=True)
class Reading:
    """How image files become batches; the arguments are explained in `ImageFolder`."""

    size: int | None = None
    channels: int = 3
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    random_crop: float | None = None
    flip: float = 0.5
    in_memory: bool | None = None
    max_bad_fraction: float = 0.001

    def __post_init__(self) -> None:
        _require(self.size is None or self.size >= 1, "size", self.size, "at least 1, or null")
        _require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        _require(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "in (0, 1]")
        known = self.interpolation in ("bilinear", "bicubic")
        _require(known, "interpolation", self.interpolation, "bilinear or bicubic")
        crops = self.random_crop is None or 0 < self.random_crop <= 1
        _require(crops, "random_crop", self.random_crop, "in (0, 1], or null")
        _require(0 <= self.flip <= 1, "flip", self.flip, "in [0, 1]")
        _require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "in [0, 1]")
        if self.in_memory and self.random_crop is not None:
            raise SettingsError(
                "in_memory=True keeps one view of each image and random_crop cuts a new one each epoch: leave out one "
                "of them (the augmentor `Augment` crops images in memory, on the device)"
            )

    @property
    def view(self) -> CenterView | None:
        return None if self.size is None else CenterView(self.size, self.crop_pct, self.interpolation)

    def budget(self, images: int) -> Budget:
        """What may be kept decoded of so many images."""
        if self.in_memory is not None:
            return Budget(None if self.in_memory else 0)
        known = 0 if self.size is None else images * self.channels * self.size**2
        return Budget(0 if self.random_crop is not None or known > MEMORY_BYTES else MEMORY_BYTES)


class EncodedSource(Source):
    """A source of image files.

    Args:
        files: of each split that the set has.
        labels: of each file, int64 `[N]` a split.
        classes, val_fraction, test_fraction, split_seed, notes: as in `Source`.
        reading: how the files are read.

    Raises:
        SettingsError: too many files that cannot be read, and whatever `Source` refuses.
    """

    def __init__(
        self,
        files: Mapping[str, Encoded],
        labels: Mapping[str, Tensor],
        classes: Sequence[str],
        reading: Reading,
        val_fraction: float,
        test_fraction: float,
        split_seed: int,
        notes: Sequence[str] = (),
    ) -> None:
        looks = _looks(files, reading)
        bad = {name: skipped(each, looks[name]) for name, each in files.items()}
        check_quota(bad, {name: len(each) for name, each in files.items()}, reading.max_bad_fraction)
        sizes = {look.size for each in looks.values() for look in each if look.size is not None}
        if reading.size is None and len(sizes) > 1:
            notes = (*notes, f"images have {len(sizes)} sizes and `size` is not given: all are cut to {DEFAULT_SIZE}")
            reading = replace(reading, size=DEFAULT_SIZE)
            # Once more only for pixels that will be kept.
            looks = _looks(files, reading) if reading.budget(sum(map(len, files.values()))).takes(1) else looks
        size = (reading.size, reading.size) if reading.size is not None else next(iter(sizes), (0, 0))
        super().__init__(
            _splits(files, labels, looks, bad, reading, size),
            classes,
            (reading.channels, *size),
            val_fraction,
            test_fraction,
            split_seed,
            _random_view(reading, size),
            notes,
        )
        self._reading = reading

    @property
    def crop(self) -> dict[str, Any]:
        if self._reading.view is None:
            return super().crop
        return {"crop_pct": self._reading.crop_pct, "crop_mode": "center"}

    @property
    def _how(self) -> str:
        # Where pixels are held and how many bad files are put up with changes none of them.
        return repr(replace(self._reading, in_memory=None, max_bad_fraction=0.0))


def _looks(files: Mapping[str, Encoded], reading: Reading) -> dict[str, list[Look]]:
    budget = reading.budget(sum(map(len, files.values())))
    return {name: survey(each, reading.channels, reading.view, budget) for name, each in files.items()}


def _splits(
    files: Mapping[str, Encoded],
    labels: Mapping[str, Tensor],
    looks: Mapping[str, list[Look]],
    bad: Mapping[str, tuple[Skipped, ...]],
    reading: Reading,
    size: tuple[int, int],
) -> dict[str, Split]:
    good = {name: [i for i, look in enumerate(each) if look.reason is None] for name, each in looks.items()}
    kept = all(_is_kept(looks[name][i], size) for name, rows in good.items() for i in rows)
    splits = {}
    for name, rows in good.items():
        label = labels[name][rows]
        if kept and rows:
            pixels = _stacked([looks[name][i].pixels for i in rows])
            data = TensorData({"image": pixels, "label": label})
        else:
            data = Pictures(files[name], rows, label, reading.channels, reading.view)
        digests = [looks[name][i].digest for i in rows]
        origin = Origin.of(len(files[name]), digests, torch.tensor(rows, dtype=torch.int64)) if name == TRAIN else None
        splits[name] = Split(data, label, digests, bad[name], origin)
    return splits


def _is_kept(look: Look, size: tuple[int, int]) -> bool:
    return look.pixels is not None and look.pixels.shape[:2] == size


def _stacked(pixels: Sequence[np.ndarray]) -> Tensor:
    """`[N, C, H, W]` from arrays `[H, W]` or `[H, W, 3]`."""
    stacked = torch.from_numpy(np.stack(pixels))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def _random_view(reading: Reading, size: tuple[int, int]) -> RandomView | None:
    if reading.random_crop is None:
        return None
    return RandomView(size, reading.random_crop, flip=reading.flip, interpolation=reading.interpolation)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise SettingsError(f"{name}={value!r} is not allowed: it must be {allowed}")
