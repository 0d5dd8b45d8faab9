"""Folders of images, one per class."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from visiondistill.data.encoded import EncodedSource, Reading
from visiondistill.data.source import SPLITS, TRAIN
from visiondistill.data.views import Interpolation
from visiondistill.engine.errors import SettingsError, some

EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif")
)
"""What is listed as an image, in upper or lower case. What is inside is told by content."""

FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Names that a split's folder may have, in upper or lower case."""


class ImageFolder(EncodedSource):
    """`root/train/CLASS/...`, `root/val/CLASS/...`, `root/test/CLASS/...`; or `root/CLASS/...` alone.

    The listing, decided once: a class is a folder directly below its split, named in Unicode
    normal form C; classes are numbered, and the files of each listed, in the order of code points
    (`"B" < "a"`, `"10" < "9"`). Files lie at any depth below. Names that begin with a dot are left
    out, and so are files whose extension is not an image's (upper or lower case); the account says
    how many. Links to files and folders are followed, and what is there twice is counted as
    doubled. All splits must have the same classes.

    Every file is decoded once before training. What cannot be read is left out, logged and
    counted; a file that breaks afterwards stops the run. How pixels are read: `data.pixels.decode`.

    Args:
        root: the folder.
        size: height and width of every image, cut as `crop_pct` says. None keeps the images' own
            where all have one size, and takes 224 otherwise.
        channels: 3 for colour, 1 for grey; images of the other kind are converted.
        crop_pct: the shorter side is resized to `size / crop_pct` and the middle cut out, in (0, 1].
        interpolation: of the resizing, with antialiasing.
        random_crop: training images are random crops of at least this share of the area, resized
            to `size`, in (0, 1]; cut by the loader's workers. None gives them the same view as in evaluation.
        flip: probability that such a crop is mirrored, in [0, 1].
        in_memory: hold the images decoded. None does so up to 512 MiB, where random_crop is None;
            the pixels are the same either way.
        val_fraction: share of the training images to validate on, where there is no such folder; 0 for none.
        test_fraction: the same for the test, always with the same images.
        split_seed: which images are validation.
        max_bad_fraction: greatest share of unreadable files in a split.
        classes: names in the order of their labels, where that is not the order of code points
            (a teacher's); they must be the folders' names.
        splits: which folder is which split, where they have other names: `{"train": "train",
            "test": "val"}` tests on ImageNet's validation images and carves others.

    Raises:
        SettingsError: no such folder, no image in it, classes that differ between splits or from
            `classes`, too many unreadable files, or a number outside its range.
    """

    def __init__(
        self,
        root: str,
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
        classes: Sequence[str] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        reading = Reading(size, channels, crop_pct, interpolation, random_crop, flip, in_memory, max_bad_fraction)
        folders = _split_folders(Path(root), splits)
        listings = {split: _classes_of(folder) for split, folder in folders.items()}
        names = _agreed({split: set(listing) for split, listing in listings.items()}, classes, folders)
        notes = _beside(Path(root), folders)
        files, labels = {}, {}
        for split, listing in listings.items():
            paths, left = _listed([listing[name] for name in names])
            empty = [name for name, found in zip(names, paths, strict=True) if not found]
            if empty and split == TRAIN:
                raise SettingsError(f"{folders[split]}: no image of {some(empty)}; remove the folder or fill it")
            notes += [f"{split}: no image of {some(empty)}"] if empty else []
            notes += [f"{split}: {sum(left.values())} other files left out ({_kinds(left)})"] if left else []
            files[split] = Files(folders[split], [path for found in paths for path in found])
            labels[split] = torch.tensor([n for n, found in enumerate(paths) for _ in found], dtype=torch.int64)
        super().__init__(files, labels, names, reading, val_fraction, test_fraction, split_seed, notes)


class Files:
    """`Encoded` over paths; a name is the path below `root`."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        with open(self.paths[index], "rb") as file:
            return file.read()


def _split_folders(root: Path, splits: Mapping[str, str] | None) -> dict[str, Path]:
    if not root.is_dir():
        raise SettingsError(f"root={str(root)!r} is not a folder")
    if splits is not None:
        return _named_folders(root, splits)
    found: dict[str, Path] = {}
    for split, names in FOLDERS.items():
        there = [root / name for name in _subfolders(root) if name.lower() in names and _holds_classes(root / name)]
        if len(there) > 1:
            raise SettingsError(f"{root} has {' and '.join(p.name for p in there)}: say which is {split} in `splits`")
        found |= {split: there[0]} if there else {}
    if found and TRAIN not in found:
        raise SettingsError(f"{root} has a folder for {some(found)}, but none for train: name it in `splits`")
    return found or {TRAIN: root}


def _named_folders(root: Path, splits: Mapping[str, str]) -> dict[str, Path]:
    wrong = sorted(set(splits) - set(SPLITS))
    if wrong or TRAIN not in splits:
        raise SettingsError(f"splits must name a folder for train, and may for val and test, got {dict(splits)}")
    missing = [name for name in splits.values() if not (root / name).is_dir()]
    if missing:
        raise SettingsError(f"{root} has no folder {some(missing)}; there are {some(_subfolders(root))}")
    if len({os.path.realpath(root / name) for name in splits.values()}) < len(splits):
        raise SettingsError(f"one folder cannot serve two splits, got {dict(splits)}")
    return {split: root / splits[split] for split in SPLITS if split in splits}


def _beside(root: Path, folders: Mapping[str, Path]) -> list[str]:
    """A note on folders next to those of the splits, such as a test folder whose images lie in no class."""
    if root in folders.values():
        return []
    used = {folder.relative_to(root).parts[0] for folder in folders.values()}
    left = [name for name in _subfolders(root) if name not in used]
    return [f"left out beside {some(sorted(used))}: {some(left)}, no split or without classes"] if left else []


def _holds_classes(folder: Path) -> bool:
    # A class may be called "train": then images lie in it, not folders.
    return folder.is_dir() and bool(_subfolders(folder)) and not any(map(_is_image, folder.iterdir()))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _is_image(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix[1:].lower() in EXTENSIONS


def _classes_of(folder: Path) -> dict[str, Path]:
    classes: dict[str, Path] = {}
    for name in _subfolders(folder):
        normal = unicodedata.normalize("NFC", name)
        if normal in classes:
            raise SettingsError(f"{folder}: two folders are called {normal!r}, in different Unicode forms; merge them")
        classes[normal] = folder / name
    if not classes:
        raise SettingsError(f"{folder} has no folder per class")
    return classes


def _agreed(found: dict[str, set[str]], given: Sequence[str] | None, folders: Mapping[str, Path]) -> list[str]:
    """The names in label order, once all splits have the same."""
    wanted = found[TRAIN] if given is None else {unicodedata.normalize("NFC", name) for name in given}
    whose = f"{folders[TRAIN]}" if given is None else "`classes`"
    if given is not None and len(wanted) < len(given):
        raise SettingsError(f"`classes` names one class twice: {list(given)}")
    for split, names in found.items():
        missing, extra = sorted(wanted - names), sorted(names - wanted)
        if missing or extra:
            said = [f"lacks {some(missing)}"] if missing else []
            said += [f"has {some(extra)} besides"] if extra else []
            raise SettingsError(f"classes differ: compared with {whose}, {folders[split]} {' and '.join(said)}")
    return sorted(wanted) if given is None else [unicodedata.normalize("NFC", name) for name in given]


def _listed(folders: Sequence[Path]) -> tuple[list[list[str]], Counter[str]]:
    """Image paths of each folder in code point order, and the extensions of other files."""
    left: Counter[str] = Counter()
    images = []
    for folder in folders:
        names = sorted(_below(folder, "", (os.path.realpath(folder),)))
        images.append([str(folder / name) for name in names if _is_image(Path(name))])
        left.update(Path(name).suffix.lower() or "no extension" for name in names if not _is_image(Path(name)))
    return images, left


def _below(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of files below, with "/" between names. A link to a folder above itself is not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield prefix + entry.name
                continue
            real = os.path.realpath(entry.path)
            if real not in above:
                yield from _below(Path(entry.path), f"{prefix}{entry.name}/", (*above, real))


def _kinds(left: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
