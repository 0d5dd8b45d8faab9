"""Data sets that exist as Python objects: the user's own, and the digits of the package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from visiondistill.data.digits import Digits
from visiondistill.data.pictures import every_row
from visiondistill.data.samples import Samples, as_float_image, to_image
from visiondistill.data.source import SPLITS, TRAIN, Source, Split, require_same_classes
from visiondistill.data.tensors import TensorData
from visiondistill.engine.errors import SettingsError

LABELS = ("targets", "labels", "_labels")
"""Attributes in which data sets keep the labels of all samples, torchvision's under all three names."""


class OwnData(Source):
    """The user's own map-style data sets.

    A sample is a pair `(image, label)` or a dict with "image" and "label"; images as in
    `data.samples.to_image`, all of one shape. A sample that cannot be read stops the run.

    Args:
        train, val, test: data sets with `len(data)` and `data[i]`; None for a split to be carved from `train`.
        classes: names in the order of the labels; None takes `train.classes`, or the numbers that occur.
        in_memory: hold the samples as they are read at the start. Only for data sets without
            random transforms. None does so for `TensorData` alone.
        val_fraction, test_fraction, split_seed: as in `Source`.

    Raises:
        SettingsError: labels that cannot be had, and whatever `Source` refuses.
    """

    def __init__(
        self,
        train: Any,
        val: Any = None,
        test: Any = None,
        classes: Sequence[str] | None = None,
        in_memory: bool | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        sets = {name: data for name, data in zip(SPLITS, (train, val, test), strict=True) if data is not None}
        _check_names(sets)
        splits = {name: split_of(data, bool(in_memory)) for name, data in sets.items()}
        names = names_of(train, splits) if classes is None else list(classes)
        super().__init__(splits, names, shape_of(splits[TRAIN].data), val_fraction, test_fraction, split_seed)


class EmbeddedDigits(Source):
    """The handwritten digits of the package, `data.Digits`: 1,097 to train, 200 to validate, 500 to test.

    Args:
        labels_per_class, unlabelled, split_seed, label_seed: as in `data.Digits`.
    """

    def __init__(
        self,
        labels_per_class: int | None = None,
        unlabelled: Literal["keep", "drop"] = "keep",
        split_seed: int = 0,
        label_seed: int = 0,
    ) -> None:
        sets = {
            "train": Digits("train", labels_per_class, unlabelled, split_seed, label_seed),
            "val": Digits("val", split_seed=split_seed),
            "test": Digits("test"),
        }
        splits = {name: split_of(data) for name, data in sets.items()}
        super().__init__(splits, [str(digit) for digit in range(10)], (1, 8, 8))


def split_of(data: Any, in_memory: bool = False) -> Split:
    """A given data set as a split; labels come from `targets`, or from a look at every sample.

    Args:
        data: `TensorData`, or a map-style data set of samples as in `Samples`.
        in_memory: read every sample once and keep it; floating images stay floating.
    """
    if not isinstance(data, TensorData) and in_memory:
        data = _read_all(data)
    if isinstance(data, TensorData):
        if "label" not in data.columns:
            raise SettingsError(f"{type(data).__name__} has no column 'label'")
        return Split(data, data.columns["label"], _digests(data.columns["image"]))
    label = _labels(data)
    return Split(every_row(data, label), label)


def names_of(data: Any, splits: Mapping[str, Split]) -> list[str]:
    """The class names that a data set has (`classes`), or the numbers up to the greatest label."""
    named = getattr(data, "classes", None)
    if named is None:
        named = range(1 + max(int(split.label.max()) for split in splits.values()))
    return [", ".join(name) if isinstance(name, tuple) else str(name) for name in named]


def shape_of(data: Any) -> tuple[int, int, int]:
    """`(C, H, W)` of the first image."""
    if isinstance(data, TensorData):
        return tuple(data.columns["image"].shape[1:])
    return tuple(Samples(data, None, seed=0)[0, 0]["image"].shape)


def _check_names(sets: Mapping[str, Any]) -> None:
    named = {split: list(data.classes) for split, data in sets.items() if getattr(data, "classes", None) is not None}
    if TRAIN in named:
        require_same_classes({split: [str(name) for name in names] for split, names in named.items()})


def _labels(data: Any) -> Tensor:
    known = next((found for name in LABELS if (found := getattr(data, name, None)) is not None), None)
    if known is None:
        samples = Samples(data, None, seed=0)
        try:
            known = [int(samples[0, index]["label"]) for index in range(len(data))]
        except KeyError:
            raise SettingsError(
                f"{type(data).__name__} gives no label: its samples need 'label', -1 for none"
            ) from None
    label = torch.as_tensor(known).long()
    if label.shape != (len(data),):
        raise SettingsError(f"{type(data).__name__} has {len(data)} samples, but labels of shape {tuple(label.shape)}")
    return label


def _read_all(data: Any) -> TensorData:
    """Every sample once. 8-bit images are kept in 8 bits."""
    samples = Samples(data, None, seed=0)
    images, labels = [], []
    for index in range(len(data)):
        sample = samples.named(index)
        images.append(_stored(sample["image"]))
        labels.append(int(sample.get("label", -1)))
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise SettingsError(
            f"{type(data).__name__} has images of shapes {sorted(shapes)[:3]}: to hold them in memory they need one"
        )
    exact = all(image.dtype == torch.uint8 for image in images)
    whole = torch.stack(images if exact else [as_float_image(image) for image in images])
    return TensorData({"image": whole, "label": torch.tensor(labels)})


def _stored(image: Any) -> Tensor:
    """`[C, H, W]` of what `to_image` makes, in 8 bits where the image is."""
    if getattr(image, "mode", None) in ("L", "RGB"):
        image = np.array(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        return image if image.ndim == 3 else image[None]
    return to_image(image)


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.tobytes()).digest() for image in images.cpu().contiguous().numpy()]
