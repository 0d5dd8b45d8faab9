"""The classification sets of torchvision, by class name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from visiondistill.data.encoded import MEMORY_BYTES
from visiondistill.data.own import names_of, shape_of, split_of
from visiondistill.data.source import SPLITS, TRAIN, Source, require_train
from visiondistill.engine.errors import SettingsError

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What torchvision's classes call their splits; those that a class does not know are left out."""


class Torchvision(Source):
    """A set of `torchvision.datasets`: CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, STL10, Flowers102, ...

    Pixels are those that torchvision decodes; an image that cannot be read stops the run.

    Args:
        name: class in `torchvision.datasets`.
        root: where its files lie, as that class wants them.
        download: fetch them where they are missing.
        options: further arguments of the class, such as `{"split": "letters"}` for EMNIST.
        splits: what the class calls its splits, where that is not "train", "val" and "test":
            `{"train": "trainval", "test": "test"}` for OxfordIIITPet.
        transform: of each PIL image, the same each time (a resize): images of a batch need one shape.
        in_memory: hold the images decoded. None does so up to 512 MiB where torchvision does, too.
        val_fraction, test_fraction, split_seed: as in `Source`.

    Raises:
        SettingsError: no such set, no such split, or files that are not there.
    """

    def __init__(
        self,
        name: str,
        root: str,
        download: bool = False,
        options: dict[str, Any] | None = None,
        splits: Mapping[str, str] | None = None,
        transform: Callable | None = None,
        in_memory: bool | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        make = _Maker(name, {"root": root, "download": download, "transform": transform} | (options or {}))
        sets = _sets(name, make, splits)
        held = _fits_memory(sets) if in_memory is None else in_memory
        made = {split: split_of(data, held) for split, data in sets.items()}
        size = shape_of(made[TRAIN].data)
        super().__init__(made, names_of(sets[TRAIN], made), size, val_fraction, test_fraction, split_seed)


class _Maker:
    """One of torchvision's classes: called with the name that it has for a split, it gives the data set.

    A set without splits is all "train".

    Raises:
        SettingsError: no such class; when called, files that are not there, or unfitting options.
        _UnknownSplit: when called: the class has no such split.
    """

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        from torchvision import datasets

        self.name, self.kind = name, getattr(datasets, name, None)
        if not inspect.isclass(self.kind):
            known = ", ".join(sorted(datasets.__all__))
            raise SettingsError(f"torchvision.datasets has no {name!r}; there are {known}")
        # The families of MNIST and ImageNet hide arguments behind **kwargs.
        hides, self.parameters = issubclass(self.kind, datasets.MNIST), inspect.signature(self.kind).parameters
        self.has_two = "train" in self.parameters or hides
        downloads = "download" in self.parameters or hides
        self.arguments = {key: value for key, value in arguments.items() if key != "download" or downloads}

    def __call__(self, split: str) -> Any:
        try:
            return self.kind(**self.arguments, **self._chosen(split))
        except ValueError as error:
            if "Valid values" not in str(error) and "Unknown" not in str(error):
                raise
            raise _UnknownSplit(str(error)) from error
        except (RuntimeError, FileNotFoundError) as error:
            cure = "give the folder that holds its files, or download=True"
            raise SettingsError(f"{self.name} in root={self.arguments['root']!r}: {error}; {cure}") from error
        except TypeError as error:
            raise SettingsError(f"options of {self.name}: {error}") from error

    def _chosen(self, split: str) -> dict[str, Any]:
        """The argument by which the class is asked for a split."""
        if self.has_two:
            if split not in ("train", "test"):
                raise _UnknownSplit(f"{self.name} has 'train' and 'test', no {split!r}")
            return {"train": split == "train"}
        if "split" in self.parameters and "split" not in self.arguments:
            return {"split": split}
        if split != "train":
            raise _UnknownSplit(f"{self.name} has no splits, so no {split!r}")
        return {}


class _UnknownSplit(Exception):
    """torchvision's class has no such split."""


def _sets(name: str, make: Callable[[str], Any], splits: Mapping[str, str] | None) -> dict[str, Any]:
    if splits is not None:
        require_train(splits)
        try:
            return {split: make(splits[split]) for split in SPLITS if split in splits}
        except _UnknownSplit as error:
            raise SettingsError(f"splits={dict(splits)}: {error}") from error
    sets: dict[str, Any] = {}
    for split, names in SPLIT_NAMES.items():
        for each in names:
            try:
                sets[split] = make(each)
                break
            except _UnknownSplit as error:
                if split == TRAIN:
                    raise SettingsError(f"{name} has no split 'train': name its splits in `splits`: {error}") from error
    return sets


def _fits_memory(sets: Mapping[str, Any]) -> bool:
    arrays = [getattr(data, "data", None) for data in sets.values()]
    return all(hasattr(array, "nbytes") for array in arrays) and sum(array.nbytes for array in arrays) <= MEMORY_BYTES
