"""The 1,797 handwritten digits that ship with the package: enough to see a method work in seconds."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from visiondistill.data.tensors import TensorData
from visiondistill.engine.rng import key

TEST_PER_CLASS, VAL_PER_CLASS = 50, 20


class Digits(TensorData):
    """8x8 grey images of ten digits, with fixed stratified splits.

    500 test images (50 a class) are always the same ones. 200 validation images (20 a class) are
    carved from the others by `split_seed`; 1,097 remain to train on.

    Source: Alpaydin and Kaynak, UCI Machine Learning Repository 1998, CC BY 4.0, in the copy of
    scikit-learn (BSD 3-Clause); see `digits/README.md`.

    Args:
        split: "train", "val" or "test". Choose by "val"; read "test" once, at the end.
        labels_per_class: keep so many labels of each class in "train" and set the others to -1.
        unlabelled: "keep" or "drop" the images whose label was set to -1.
        split_seed: which images are validation.
        label_seed: which images keep their label.

    Raises:
        ValueError: labels_per_class outside 1 to 121, or asked for "val" or "test".
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        labels_per_class: int | None = None,
        unlabelled: Literal["keep", "drop"] = "keep",
        split_seed: int = 0,
        label_seed: int = 0,
    ) -> None:
        if labels_per_class is not None and split != "train":
            raise ValueError(f"labels_per_class is for split='train', not for {split!r}")
        image, label = _load()
        rows = _split(label, split, split_seed)
        image, label = image[rows], label[rows]
        if labels_per_class is not None:
            keeps = _labelled(label, labels_per_class, label_seed)
            label = torch.where(keeps, label, -1)
            if unlabelled == "drop":
                image, label = image[keeps], label[keeps]
        super().__init__({"image": image, "label": label})


def _load() -> tuple[Tensor, Tensor]:
    with files("visiondistill.data").joinpath("digits/digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        image, label = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"])
    return (image.float() / 16)[:, None], label.long()


def _split(label: Tensor, split: str, split_seed: int) -> Tensor:
    # The test set must not move with the seed, or tuning over seeds would read all of it.
    test, rest = _per_class(label, torch.arange(len(label)), TEST_PER_CLASS, key("digits", "test"))
    if split == "test":
        return test
    val, train = _per_class(label, rest, VAL_PER_CLASS, key("digits", "val", split_seed))
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}")
    return train if split == "train" else val


def _labelled(label: Tensor, count: int, label_seed: int) -> Tensor:
    """Bool `[N]`: `count` rows of each class."""
    fewest = int(label.bincount().min())
    if not 1 <= count <= fewest:
        raise ValueError(f"labels_per_class must be in 1 to {fewest}, got {count}")
    chosen, _ = _per_class(label, torch.arange(len(label)), count, key("digits", "labels", label_seed))
    keeps = torch.zeros(len(label), dtype=torch.bool)
    keeps[chosen] = True
    return keeps


def _per_class(label: Tensor, rows: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` of `rows` per class, drawn by `seed`, and the others; both in ascending order."""
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    taken = torch.cat([shuffled[label[shuffled] == digit][:count] for digit in label.unique()]).sort().values
    return taken, rows[~torch.isin(rows, taken)]
