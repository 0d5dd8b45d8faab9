"""Features of a set of images, and the moments that a Frechet distance takes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from diffusion.eval.extractors import Extractor, quantised
from visiondistill.engine.errors import SettingsError
from visiondistill.eval import evaluating

CHUNK = 4096
"""Rows that are lifted to float64 at a time."""


@dataclass(frozen=True)
class Statistics:
    """Sums over rows, in float64. Those of parts add up to those of the whole, however it was cut.

    Attributes:
        count: rows.
        total: their sum `[D]`.
        square: the sum of their outer products `[D, D]`.
    """

    count: int
    total: Tensor
    square: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of rows `[N, D]`.

        Raises:
            ValueError: not a matrix, or without a row.
        """
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be [N, D] with N >= 1, got {tuple(features.shape)}")
        square = torch.zeros(2 * (features.shape[1],), dtype=torch.float64, device=features.device)
        total = square.new_zeros(features.shape[1])
        for rows in features.split(CHUNK):
            rows = rows.double()
            total += rows.sum(0)
            square.addmm_(rows.T, rows)
        return cls(len(features), total, square)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.count + other.count, self.total + other.total, self.square + other.square)

    @property
    def mean(self) -> Tensor:
        """`[D]`."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """`[D, D]`, unbiased.

        Raises:
            ValueError: of fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError("one image has no covariance: take at least 2")
        return (self.square - torch.outer(self.mean, self.total)) / (self.count - 1)


@dataclass(frozen=True)
class FeatureSet:
    """What one extractor makes of a set of images.

    Attributes:
        features: float32 `[N, D]`.
        label: int64 `[N]`, -1 for none.
    """

    features: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def statistics(self) -> Statistics:
        return Statistics.of(self.features)

    def to(self, device: torch.device) -> FeatureSet:
        """Itself where it is there already."""
        if self.features.device == device:
            return self
        return FeatureSet(self.features.to(device), self.label.to(device))

    def halves(self, size: int, seed: int = 0) -> tuple[FeatureSet, FeatureSet]:
        """Two disjoint random parts of `size` rows, or of half the rows where there are fewer."""
        size = min(size, len(self) // 2)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        first, second = (FeatureSet(self.features[rows], self.label[rows]) for rows in order[: 2 * size].split(size))
        return first, second


@dataclass(frozen=True)
class Collected:
    """What one pass over images gives.

    Attributes:
        sets: features by each extractor, in their order, on the CPU.
        label: int64 `[N]`, -1 for none.
        answer: a classifier's, int64 `[N]`; None without one.
    """

    sets: tuple[FeatureSet, ...]
    label: Tensor
    answer: Tensor | None

    @property
    def accuracy(self) -> float | None:
        """Share of the labelled images that the classifier answers with their label; None without any."""
        known = self.label >= 0
        if self.answer is None or not known.any():
            return None
        return float((self.answer == self.label)[known].double().mean())


@torch.no_grad()
def collect(
    batches: Iterable[tuple[Tensor, Tensor | None]],
    extractors: Sequence[Extractor],
    classifier: nn.Module | None = None,
) -> Collected:
    """Features of streamed images, every extractor and the classifier on the same 8-bit pixels.

    Nothing waits for the device before the last batch. Frames of videos count as images.

    Args:
        batches: images `[B, C, H, W]` or `[B, F, C, H, W]`, floating in [0, 1] or uint8, and
            labels `[B]` or None.
        classifier: of pixels in [0, 1]; gives logits, or something with `logits`. It runs in eval mode.

    Raises:
        SettingsError: no image, or values that are not finite or leave [0, 1].
    """
    rows: list[list[Tensor]] = [[] for _ in extractors]
    labels, answers, wrong = [], [], []
    for images, label in batches:
        images, label = _frames(images, label)
        wrong.append(_outside(images))
        labels.append(label)
        pixels = quantised(images)
        for held, extractor in zip(rows, extractors, strict=True):
            held.append(extractor.features(pixels))
        if classifier is not None:
            with evaluating(classifier):
                logits = classifier(pixels.to(device_of(classifier)).float() / 255)
            answers.append(getattr(logits, "logits", logits).argmax(1))
    if not labels:
        raise SettingsError("there is no image to measure")
    _require_inside(torch.cat(wrong).cpu())
    label = torch.cat(labels).cpu()
    sets = tuple(FeatureSet(torch.cat(held).cpu(), label) for held in rows)
    return Collected(sets, label, torch.cat(answers).cpu() if answers else None)


def device_of(module: nn.Module) -> torch.device:
    """Where its tensors are; the CPU where it has none."""
    return next((held.device for held in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _frames(images: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    label = torch.full((len(images),), -1, device=images.device) if label is None else label
    if images.ndim == 5:
        return images.flatten(0, 1), label.repeat_interleave(images.shape[1])
    return images, label


def _outside(images: Tensor) -> Tensor:
    """Bool `[B]`: which have a pixel that is not finite, or not in [0, 1]."""
    if images.dtype == torch.uint8:
        return torch.zeros(len(images), dtype=torch.bool, device=images.device)
    return ~((images >= 0) & (images <= 1)).flatten(1).all(1)


def _require_inside(wrong: Tensor) -> None:
    if wrong.any():
        raise SettingsError(
            f"{int(wrong.sum())} of {len(wrong)} images have pixels that are not finite or not in [0, 1], the first "
            f"being number {int(wrong.nonzero()[0])}: floating images go from 0 to 1, others are uint8"
        )
