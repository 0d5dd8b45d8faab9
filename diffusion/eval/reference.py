"""Real images that generators are held against, and their features, kept by what they depend on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion.eval.extractors import Extractor, quantised
from diffusion.eval.features import FeatureSet, collect
from visiondistill.data import Source, TensorData, in_order
from visiondistill.engine import state
from visiondistill.engine.errors import ResumeError

FORMAT = 1
"""Of the stored features: raised when what they mean changes."""
NAME = "features"


@dataclass(frozen=True)
class Reference:
    """Real images, in their order.

    Attributes:
        data: `TensorData` or a map-style set, as `visiondistill.data.in_order` takes it.
        info: what they are, for reports.
        batch_size: that they are read with.
    """

    data: Any
    info: dict[str, Any]
    batch_size: int = 256

    @classmethod
    def of(cls, images: Source | Tensor, split: str = "test") -> Reference:
        """A source's split, or a tensor `[N, C, H, W]` (uint8, or floating in [0, 1]).

        Raises:
            SettingsError: the source has no such split.
        """
        if isinstance(images, Tensor):
            return cls(TensorData({"image": images}), {"type": "Tensor", "images": len(images)})
        data = images.split(split).data
        return cls(data, {"type": type(images).__name__, "split": split, "images": len(data)})

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images and labels, batch by batch."""
        for batch in in_order(self.data, self.batch_size):
            yield batch["image"], batch.get("label")

    @property
    def size(self) -> tuple[int, ...]:
        """`(C, H, W)` of the images."""
        return tuple(next(self.batches())[0].shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Of all pixels, as 8 bits, and labels."""
        digest = hashlib.sha256()
        for images, label in self.batches():
            labels = [-1] * len(images) if label is None else label.tolist()
            # By the row, so that the digest does not depend on how the images are batched.
            for image, number in zip(quantised(images).cpu().numpy(), labels, strict=True):
                digest.update(f"{image.shape} {number}".encode())
                digest.update(image.tobytes())
        return digest.hexdigest()


def reference_features(reference: Reference, extractor: Extractor, cache: str | Path | None = None) -> FeatureSet:
    """Features of real images, from the cache where they are there.

    An entry is a folder named by the sha256 of all that it depends on: pixels and labels, the
    extractor's weights, its preprocessing. It is read only if these and its checksums agree.

    Args:
        cache: folder; None keeps nothing.
    """
    if cache is None:
        return collect(reference.batches(), [extractor]).sets[0]
    facts = {"format": FORMAT, "images": reference.sha256, **extractor.facts}
    folder = Path(cache) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    kept = _kept(folder, facts)
    if kept is None:
        kept = collect(reference.batches(), [extractor]).sets[0]
        state.save(folder, {NAME: {"features": kept.features, "label": kept.label}}, facts)
    return kept


def _kept(folder: Path, facts: dict[str, Any]) -> FeatureSet | None:
    if not folder.is_dir():
        return None
    try:
        tensors, meta = state.load(folder)
    except ResumeError as error:
        warnings.warn(f"features of the reference are made anew: {error}", stacklevel=3)
        return None
    # As they come back from a file, where tuples are lists.
    return FeatureSet(**tensors[NAME]) if meta == json.loads(json.dumps(facts)) else None
