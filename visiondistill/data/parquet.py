"""Parquet files as the Hugging Face hub has them: a column of encoded images and a column of labels."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiondistill.data.encoded import EncodedSource, Reading
from visiondistill.data.source import SPLITS, TRAIN, require_same_classes
from visiondistill.data.views import Interpolation
from visiondistill.engine.errors import SettingsError

PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
"""How the names of a split's files begin, up to "-", "." or "_"."""

GROUPS_HELD = 4
"""Row groups that a process keeps read. A random image costs the reading of its group where it is not among them."""


class Parquet(EncodedSource):
    """Images with labels in parquet files, in the layout of the Hugging Face hub.

    Splits are told by how file names begin: `train-00000-of-00005.parquet`, `validation-...`,
    `test-...`, in `root` or in `root/data`, or by their folder: `train/0000.parquet`; a single file is
    the training split. Files are read one row group at a time. Names of classes come from the schema's
    `huggingface` metadata; without that a column of text gives its values in the order of code points,
    and integers are their own names. All splits must have the same names. A missing label is -1.

    Args:
        root: folder or file.
        size, channels, crop_pct, interpolation, random_crop, flip, in_memory: as in `ImageFolder`.
        val_fraction, test_fraction, split_seed, max_bad_fraction: as in `ImageFolder`.
        image: column of the images, a struct of `bytes` and `path`, or bytes alone.
        label: column of the labels, integers or text.
        classes: names in the order of the labels, in place of the file's. They must be as many; for
            a column of text they must be its values.
        splits: how the names of a split's files begin, where it is not as above: `{"train":
            "train", "test": "validation"}`.

    Raises:
        SettingsError: no such file or column, classes that differ between splits, a label without
            a class, too many unreadable images, or a number outside its range.
        ImportError: pyarrow is not installed.
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
        image: str = "image",
        label: str = "label",
        classes: Sequence[str] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        reading = Reading(size, channels, crop_pct, interpolation, random_crop, flip, in_memory, max_bad_fraction)
        found = _split_files(Path(root), splits)
        files = {split: ParquetImages(paths, image) for split, paths in found.items()}
        columns = {split: _column(paths, label) for split, paths in found.items()}
        names = _names(columns, {split: _schema_names(paths, label) for split, paths in found.items()}, classes, label)
        labels = {split: _numbers(values, names, label) for split, values in columns.items()}
        notes = [note for split, paths in found.items() if (note := _missing_shards(split, paths))]
        super().__init__(files, labels, names, reading, val_fraction, test_fraction, split_seed, notes)


class ParquetImages:
    """`Encoded` over the rows of parquet files, in order; each process keeps a few row groups read.

    Args:
        paths: the files.
        column: of the images.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths, self.column = list(paths), column
        self.groups: list[tuple[Path, int]] = []
        counts = []
        for path in paths:
            metadata = _open(path, column).metadata
            self.groups += [(path, group) for group in range(metadata.num_row_groups)]
            counts += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = torch.tensor([0, *accumulate(counts)])
        self._forget()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> str:
        group, row = self._place(index)
        path, _ = self.groups[group]
        first = next(g for g, (other, _) in enumerate(self.groups) if other == path)
        within = int(self.starts[group] - self.starts[first]) + row
        inner = self._row(group, row)
        inner = inner.get("path") if isinstance(inner, dict) else None
        return f"{path}, row {within}" + (f" ({inner})" if inner else "")

    def read(self, index: int) -> bytes:
        value = self._row(*self._place(index))
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the row holds no bytes" + (" but a path alone" if isinstance(value, dict) else ""))
        return data

    def _place(self, index: int) -> tuple[int, int]:
        group = int(torch.searchsorted(self.starts, index, right=True)) - 1
        return group, index - int(self.starts[group])

    def _row(self, group: int, row: int) -> Any:
        with self._lock:
            if group not in self._read:
                path, number = self.groups[group]
                table = _open(path, self.column).read_row_group(number, columns=[self.column])
                self._read[group] = table.column(0).combine_chunks()
                if len(self._read) > GROUPS_HELD:
                    self._read.popitem(last=False)
            self._read.move_to_end(group)
            column = self._read[group]
        return column[row].as_py()

    def _forget(self) -> None:
        self._read: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_read", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = dict(state)
        self._forget()


def _open(path: Path, column: str) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'visiondistill[data]'") from error
    try:
        file = ParquetFile(path, memory_map=True)
    except (ArrowException, OSError) as error:
        raise SettingsError(f"{path} is not a readable parquet file: {error}") from error
    if column not in file.schema_arrow.names:
        raise SettingsError(f"{path} has no column {column!r}; there are {', '.join(file.schema_arrow.names)}")
    return file


def _split_files(root: Path, splits: Mapping[str, str] | None) -> dict[str, list[Path]]:
    if root.is_file():
        return {TRAIN: [root]}
    folders = ["data", *(name for names in PREFIXES.values() for name in names)]
    every = sorted([*root.glob("*.parquet"), *(path for name in folders for path in root.glob(f"{name}/*.parquet"))])
    if not every:
        below = {path.parent.parent if path.parent.name in folders else path.parent for path in root.rglob("*.parquet")}
        cure = f"; there are some in {', '.join(sorted(map(str, below))[:5])}: name one" if below else ""
        raise SettingsError(f"root={str(root)!r} has no parquet file, nor have its folders {', '.join(folders)}{cure}")
    if splits is not None and (TRAIN not in splits or set(splits) - set(SPLITS)):
        raise SettingsError(f"splits must say how files of train begin, and may of val and test, got {dict(splits)}")
    if splits is None:
        stems = {path: _split_word(path, root) for path in every}
        found = {split: [path for path in every if stems[path] in names] for split, names in PREFIXES.items()}
        found = {split: paths for split, paths in found.items() if paths}
    else:
        found = {
            split: [path for path in every if _split_name(path, root).startswith(splits[split])] for split in splits
        }
    there = ", ".join(path.name for path in every[:10])
    empty = [split for split in (TRAIN, *found) if not found.get(split)]
    if empty:
        raise SettingsError(f"{root} has no parquet file of {empty[0]}; there are {there}: see `splits`")
    if len({path for paths in found.values() for path in paths}) < sum(map(len, found.values())):
        raise SettingsError(f"one file cannot serve two splits: splits={dict(splits or {})} on {there}")
    return found


def _split_name(path: Path, root: Path) -> str:
    """What tells the split: the name of the file, or of its folder where that is a split's."""
    return path.name if path.parent == root or path.parent.name == "data" else path.parent.name


def _split_word(path: Path, root: Path) -> str:
    return re.split(r"[-._]", _split_name(path, root))[0]


def _missing_shards(split: str, paths: Sequence[Path]) -> str | None:
    totals = {int(match[1]) for path in paths if (match := re.search(r"-of-(\d+)\.parquet$", path.name))}
    if len(totals) != 1 or totals == {len(paths)}:
        return None
    return f"{split}: {len(paths)} of {totals.pop()} shards are here"


def _column(paths: Sequence[Path], name: str) -> list[Any]:
    values: list[Any] = []
    for path in paths:
        values += _open(path, name).read(columns=[name]).column(0).to_pylist()
    return values


def _schema_names(paths: Sequence[Path], label: str) -> list[str] | None:
    """Class names that the files' metadata give; None where they give none."""
    found = {path: _file_names(path, label) for path in paths}
    first = found[paths[0]]
    for path, names in found.items():
        if names != first:
            raise SettingsError(f"{path} and {paths[0]} name the classes of {label!r} differently")
    return first


def _file_names(path: Path, label: str) -> list[str] | None:
    metadata = _open(path, label).schema_arrow.metadata or {}
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _names(
    columns: Mapping[str, list[Any]],
    schema: Mapping[str, list[str] | None],
    given: Sequence[str] | None,
    label: str,
) -> list[str]:
    """The names in label order, once all splits have the same."""
    require_same_classes(schema)
    known = schema[TRAIN] or _values(columns, label)
    if given is None:
        return known
    texts = any(isinstance(value, str) for values in columns.values() for value in values)
    if len(given) != len(known) or (texts and set(given) != set(known)):
        raise SettingsError(
            f"`classes` must have {len(known)} names for those of {label!r}: {known[:10]}, got {given[:10]}"
        )
    return list(given)


def _values(columns: Mapping[str, list[Any]], label: str) -> list[str]:
    seen = {split: {value for value in values if value is not None} for split, values in columns.items()}
    every = set().union(*seen.values())
    if all(isinstance(value, str) for value in every):
        require_same_classes({split: sorted(values) for split, values in seen.items()})
        return sorted(every)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in every):
        raise SettingsError(f"column {label!r} must hold integers or text, got {type(next(iter(every))).__name__}")
    return [str(number) for number in range(max(every, default=-1) + 1)]


def _numbers(values: Sequence[Any], names: Sequence[str], label: str) -> Tensor:
    number = {name: n for n, name in enumerate(names)}
    numbers = [number[value] if isinstance(value, str) else -1 if value is None else value for value in values]
    return torch.tensor(numbers, dtype=torch.int64)
