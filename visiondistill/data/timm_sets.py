"""Data sets by the names that timm's `create_dataset` takes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visiondistill.data.encoded import EncodedSource, Reading
from visiondistill.data.source import TRAIN, require_same_classes, require_train
from visiondistill.data.views import Interpolation
from visiondistill.engine.errors import SettingsError


class TimmData(EncodedSource):
    """What `timm.data.create_dataset(name, root, split)` lists, in timm's own order of classes.

    timm numbers the classes of a folder in natural order ("9" before "10"), `ImageFolder` by code
    points; take this one for a teacher that timm trained on the folder. Only the listing is
    timm's: its data sets give a neighbour in place of a file that they cannot read, so files are
    read here, by the rule of `ImageFolder`.

    Args:
        name: "" for folders and tar files, "hfds/NAME" for Hugging Face sets.
        root: the folder, or where the set is kept.
        size, channels, crop_pct, interpolation, random_crop, flip, in_memory: as in `ImageFolder`.
        val_fraction, test_fraction, split_seed, max_bad_fraction: as in `ImageFolder`.
        splits: what timm calls the splits.
        options: further arguments of `create_dataset`, such as `{"class_map": "names.txt"}`.

    Raises:
        SettingsError: a set that timm streams or takes from torchvision, splits of the same files
            or with differing classes, and whatever `ImageFolder` refuses.
    """

    def __init__(
        self,
        name: str = "",
        root: str | None = None,
        size: int | None = None,
        channels: int = 3,
        crop_pct: float = 0.875,
        interpolation: Interpolation = "bicubic",
        random_crop: float | None = None,
        flip: float = 0.5,
        in_memory: bool | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        max_bad_fraction: float = 0.001,
        splits: Mapping[str, str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        reading = Reading(size, channels, crop_pct, interpolation, random_crop, flip, in_memory, max_bad_fraction)
        splits = {"train": "train", "val": "validation"} if splits is None else splits
        require_train(splits)
        files = {split: TimmFiles(_reader(name, root, of, options or {})) for split, of in splits.items()}
        _check_apart(files, splits)
        named = {split: each.classes() for split, each in files.items()}
        require_same_classes(named)
        labels = {split: each.labels() for split, each in files.items()}
        super().__init__(files, labels, named[TRAIN], reading, val_fraction, test_fraction, split_seed)


class TimmFiles:
    """`Encoded` over one of timm's readers.

    Args:
        reader: `reader[i]` is `(open file, label)`.
    """

    def __init__(self, reader: Any) -> None:
        # A reader that has been read from holds open files, which cannot go to a worker.
        self.unread, self.reader, self._lock = reader, copy.deepcopy(reader), threading.Lock()

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))

    def read(self, index: int) -> bytes:
        # Readers of tar files seek in one handle.
        with self._lock, self.reader[index][0] as file:
            return file.read()

    def classes(self) -> list[str]:
        """Names in the order of timm's labels."""
        numbers = getattr(self.reader, "class_to_idx", None) or getattr(self.reader, "class_name_to_idx", None)
        if not numbers:
            raise SettingsError("timm knows no class names of this set; give options={'class_map': FILE}")
        if sorted(numbers.values()) != list(range(len(numbers))):
            raise SettingsError("timm's class map must give each class its own number, from 0 without gaps")
        return sorted(numbers, key=numbers.__getitem__)

    def labels(self) -> Tensor:
        """Int64 `[N]`."""
        known = getattr(self.reader, "targets", None)
        if known is None and hasattr(self.reader, "samples"):
            known = [target for _, target in self.reader.samples]
        if known is None:
            known = [self._label(index) for index in range(len(self))]
        label = torch.as_tensor(known)
        if label.ndim != 1 or label.is_floating_point():
            raise SettingsError("an image must have one label; timm gives several per image here")
        return label.long()

    def _label(self, index: int) -> int:
        file, target = self.reader[index]
        file.close()
        return target

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.unread}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["reader"])


def _reader(name: str, root: str | None, split: str, options: dict[str, Any]) -> Any:
    from timm.data import create_dataset

    if name.startswith("torch/"):
        raise SettingsError(f"name={name!r}: take visiondistill.data.Torchvision for torchvision's sets")
    try:
        data = create_dataset(name, root=root, split=split, **options)
    except Exception as error:  # timm asserts, raises and exits on bad names, each in its own way
        raise SettingsError(f"timm cannot list {name or root!r}, split {split!r}: {error}") from error
    reader = getattr(data, "reader", None)
    if reader is None or not hasattr(reader, "__getitem__"):
        raise SettingsError(f"timm streams {name!r}, in an order of its own; it must be listable: folder, tar or hfds/")
    return reader


def _check_apart(files: Mapping[str, TimmFiles], splits: Mapping[str, str]) -> None:
    # timm takes the root itself where it finds no folder for a split, and so train as test.
    seen: dict[str, str] = {}
    for split, each in files.items():
        for name in [each.name(index) for index in range(len(each))]:
            if seen.setdefault(name, split) != split:
                raise SettingsError(
                    f"{name} is in {split} and in {seen[name]}: timm found no part of its own for each of "
                    f"{dict(splits)}; name in `splits` those that there are"
                )
