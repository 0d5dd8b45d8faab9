"""The classification sets of torchvision, by class name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from visiondistill.data.encoded import MEMORY_BYTES
from visiondistill.data.own import names_of, shape_of, split_of
from visiondistill.data.source import SPLITS, TRAIN, Source
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
        make = _maker(name, {"root": root, "download": download, "transform": transform} | (options or {}))
        sets = _sets(name, make, splits)
        held = _fits_memory(sets) if in_memory is None else in_memory
        made = {split: split_of(data, held) for split, data in sets.items()}
        size = shape_of(made[TRAIN].data)
        super().__init__(made, names_of(sets[TRAIN], made), size, val_fraction, test_fraction, split_seed)


def _maker(name: str, arguments: dict[str, Any]) -> Callable[[str], Any]:
    """From a split's name at torchvision to the data set; sets without splits are all 'train'."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not inspect.isclass(kind):
        raise SettingsError(f"torchvision.datasets has no {name!r}; there are {', '.join(sorted(datasets.__all__))}")
    parameters = inspect.signature(kind).parameters
    # The families of MNIST and ImageNet hide arguments behind **kwargs.
    two = "train" in parameters or issubclass(kind, datasets.MNIST)
    if "download" not in parameters and not issubclass(kind, datasets.MNIST):
        arguments = {key: value for key, value in arguments.items() if key != "download"}

    def make(split: str) -> Any:
        if two:
            if split not in ("train", "test"):
                raise _UnknownSplit(f"{name} has 'train' and 'test', no {split!r}")
            return kind(**arguments, train=split == "train")
        if "split" not in parameters or "split" in arguments:
            if split != "train":
                raise _UnknownSplit(f"{name} has no splits, so no {split!r}")
            return kind(**arguments)
        return kind(**arguments, split=split)

    def asked(split: str) -> Any:
        try:
            return make(split)
        except ValueError as error:
            if "Valid values" not in str(error) and "Unknown" not in str(error):
                raise
            raise _UnknownSplit(str(error)) from error
        except (RuntimeError, FileNotFoundError) as error:
            cure = "give the folder that holds its files, or download=True"
            raise SettingsError(f"{name} in root={arguments['root']!r}: {error}; {cure}") from error
        except TypeError as error:
            raise SettingsError(f"options of {name}: {error}") from error

    return asked


class _UnknownSplit(Exception):
    """torchvision's class has no such split."""


def _sets(name: str, make: Callable[[str], Any], splits: Mapping[str, str] | None) -> dict[str, Any]:
    if splits is not None:
        if TRAIN not in splits or set(splits) - set(SPLITS):
            raise SettingsError(f"splits must name train, and may val and test, got {dict(splits)}")
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
