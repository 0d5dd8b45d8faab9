"""Sources of data: three splits that never mix, the names of the classes, and an account of what was used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiondistill.data.origin import Origin
from visiondistill.data.stream import Stream
from visiondistill.data.survey import Skipped
from visiondistill.data.tensors import TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import key

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")


class Split(NamedTuple):
    """One split as the set gives it.

    Args:
        data: `TensorData`, or any map-style data set with `select(rows)`.
        label: int64 `[N]`, -1 for none.
        digest: per row, equal for equal images; None where that is not known.
        skipped: images that were left out.
        origin: of training images, where they are in the whole set; None for each in its row.
    """

    data: Any
    label: Tensor
    digest: Sequence[Any] | None = None
    skipped: tuple[Skipped, ...] = ()
    origin: Origin | None = None

    def select(self, rows: Tensor) -> Split:
        digest = None if self.digest is None else [self.digest[row] for row in rows.tolist()]
        origin = None if self.origin is None else self.origin.select(rows)
        return Split(self.data.select(rows), self.label[rows], digest, origin=origin)


@dataclass(frozen=True)
class SplitAccount:
    """What became of one split.

    Attributes:
        used: images that are read.
        skipped: images that were listed and cannot be read.
        doubled: used images that are equal to an earlier one of this split; None where it is not known.
        in_train: used images that are in the training split too; None where it is not known.
        per_class: used images of each class.
        unlabelled: used images without a label.
        carved: taken from the training images, because the set has no such split.
    """

    used: int
    skipped: tuple[Skipped, ...]
    doubled: int | None
    in_train: int | None
    per_class: tuple[int, ...]
    unlabelled: int
    carved: bool


@dataclass(frozen=True)
class Account:
    """What a source holds, for the preflight and the run folder.

    Attributes:
        source: class of the source.
        classes: names in the order of their labels.
        input_size: `(C, H, W)` of every image, None where the source does not know.
        in_memory: whether the images are held decoded.
        splits: by name.
        notes: what a reader should know besides.
    """

    source: str
    classes: tuple[str, ...]
    input_size: tuple[int, int, int] | None
    in_memory: bool
    splits: dict[str, SplitAccount]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: one line for the set, one per split, one per note."""
        size = "unknown size" if self.input_size is None else "x".join(map(str, self.input_size))
        held = "in memory" if self.in_memory else "decoded when read"
        names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        lines = [f"{self.source}: {len(self.classes)} classes ({names}), images {size}, {held}"]
        lines += [f"{name:>5}: {_counts(split)}" for name, split in self.splits.items()]
        return lines + list(self.notes)


class Source:
    """Training, validation and test data with the names of their classes.

    A split that the set lacks is carved from its training images, stratified by class and
    doubled files kept together: the test images are always the same ones, the validation images
    depend on `split_seed`. Of a class with `n` different images `round(fraction * n)` are taken,
    at least one and at most `n - 1`.

    `train`, `val` and `test` give every image the same way each time, for `in_order` and
    `evaluate`; `stream` gives the training images as they are trained on.

    Args:
        given: the splits that the set has; "train" is one of them.
        classes: names in the order of their labels.
        input_size: `(C, H, W)` of every image, where it is known.
        val_fraction, test_fraction: share of the training images, in [0, 1); 0 carves nothing.
        split_seed: which images are validation.
        train_view: for `Stream.transform`: how training images are cut at random; None for not at all.
        notes: for the account.

    Raises:
        SettingsError: no training image, a label without a class, or a fraction outside its range.
    """

    def __init__(
        self,
        given: Mapping[str, Split],
        classes: Sequence[str],
        input_size: tuple[int, int, int] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        train_view: Callable | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.classes, self.input_size, self.train_view = tuple(classes), input_size, train_view
        self._check(given)
        self._skipped = {name: split.skipped for name, split in given.items()}
        fractions = {TEST: test_fraction, VAL: val_fraction}
        self._splits, self._carved = dict(given) | {TRAIN: _placed(given[TRAIN])}, set()
        for name, fraction in fractions.items():
            if not 0 <= fraction < 1:
                raise SettingsError(f"{name}_fraction must be in [0, 1), got {fraction}")
            if name not in given and fraction > 0:
                self._carve(name, fraction, key("carve", name, *([split_seed] if name == VAL else [])))
        self._notes = tuple(notes)

    def train(self) -> Any:
        """Training images as an evaluation sees them; to train, take `stream`."""
        return self.split(TRAIN).data

    def val(self) -> Any:
        """What choices are made by. Raises SettingsError where there is none."""
        return self.split(VAL).data

    def test(self) -> Any:
        """To be read once, at the end. Raises SettingsError where there is none."""
        return self.split(TEST).data

    @property
    def crop(self) -> dict[str, Any]:
        """How an evaluation cuts images before a network sees them, as `eval.preprocessing` takes it."""
        return {"crop_pct": 1.0, "crop_mode": "squash"}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are."""
        return tuple(name for name in SPLITS if name in self._splits)

    def stream(self, batch_size: int, workers: int = 0, split: str = TRAIN) -> Stream:
        """Batches of a split, see `Stream`; training images are cut at random where the source does so, no others."""
        chosen = self.split(split)
        facts = {"contents": self._contents(split), "origin": chosen.origin}
        if split != TRAIN or self.train_view is None:
            return Stream(chosen.data, batch_size, workers, **facts)
        return Stream(chosen.data.as_stored(), batch_size, workers, self.train_view, **facts)

    def split(self, name: str) -> Split:
        """A split with its labels, as it is held. Raises SettingsError where there is none."""
        if name not in self._splits:
            raise SettingsError(f"there is no {name} split, and {name}_fraction=0 carves none from the training images")
        return self._splits[name]

    def describe(self) -> Account:
        """What is used, left out and there twice."""
        return Account(
            type(self).__name__,
            self.classes,
            self.input_size,
            isinstance(self._splits[TRAIN].data, TensorData),
            {name: self._account(name) for name in self.splits},
            self._notes,
        )

    def _contents(self, name: str) -> str:
        """A digest of what decides the images and labels of a split, as far as that is known."""
        split = self._splits[name]
        digest = hashlib.sha256(repr((self.classes, self.input_size, self._how)).encode())
        digest.update(split.label.cpu().numpy().tobytes())
        for each in split.digest or ():
            digest.update(each if isinstance(each, bytes) else str(each).encode())
        return digest.hexdigest()

    @property
    def _how(self) -> str:
        """How images are read, where the source says."""
        return ""

    def _check(self, given: Mapping[str, Split]) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise SettingsError(f"class names must be distinct and at least one, got {list(self.classes)}")
        for name in (TRAIN, *given):
            if name not in SPLITS:
                raise SettingsError(f"a split is one of {', '.join(SPLITS)}, got {name!r}")
            if name not in given or not len(given[name].label):
                raise SettingsError(f"{type(self).__name__} has no {name} image")
        for name, split in given.items():
            low, high = int(split.label.min()), int(split.label.max())
            if name != TRAIN and high == -1:
                raise SettingsError(
                    f"none of the {len(split.label)} {name} images has a label, so that nothing could be measured on "
                    f"them: leave the split out (by `splits`, where files are told apart by it)"
                )
            if low < -1 or high >= len(self.classes):
                raise SettingsError(
                    f"labels of {name} are {low} to {high}, but there are {len(self.classes)} classes: "
                    f"they must be 0 to {len(self.classes) - 1}, or -1 for none"
                )

    def _carve(self, name: str, fraction: float, seed: int) -> None:
        whole = self._splits[TRAIN]
        taken = carve(whole.label, whole.digest, fraction, seed)
        if not taken.any():
            raise SettingsError(
                f"no {name} split can be carved: every class has one image. Give one, or set {name}_fraction=0"
            )
        self._splits[name] = whole.select(taken.nonzero()[:, 0])
        self._splits[TRAIN] = whole.select((~taken).nonzero()[:, 0])
        self._carved.add(name)

    def _account(self, name: str) -> SplitAccount:
        split, train = self._splits[name], self._splits[TRAIN]
        digest, known = split.digest, None if train.digest is None else set(train.digest)
        counts = split.label[split.label >= 0].bincount(minlength=len(self.classes))
        return SplitAccount(
            used=len(split.label),
            skipped=self._skipped.get(name, ()),
            doubled=None if digest is None else len(digest) - len(set(digest)),
            in_train=None if None in (digest, known) or name == TRAIN else sum(each in known for each in digest),
            per_class=tuple(counts.tolist()),
            unlabelled=int((split.label < 0).sum()),
            carved=name in self._carved,
        )


def require_same_classes(named: Mapping[str, Sequence[str] | None]) -> None:
    """Check that every split has the names of the training classes, in the same order.

    Raises:
        SettingsError: one has not; the message lists the names that only one of the two has.
    """
    for split, names in named.items():
        if names != named[TRAIN]:
            differ = sorted(set(named[TRAIN] or ()) ^ set(names or ()))
            raise SettingsError(f"classes differ between train and {split}: {differ or 'the same in another order'}")


def require_train(splits: Mapping[str, str]) -> None:
    """Raises SettingsError unless `splits` names train, and nothing but val and test besides."""
    if TRAIN not in splits or set(splits) - set(SPLITS):
        raise SettingsError(f"splits must name train, and may name val and test, got {dict(splits)}")


def _placed(train: Split) -> Split:
    if train.origin is not None:
        return train
    return train._replace(origin=Origin.of(len(train.label), train.digest))


def carve(label: Tensor, digest: Sequence[Any] | None, fraction: float, seed: int) -> Tensor:
    """Bool `[N]`: a share of each class, drawn by `seed`; rows of equal digest stay on one side.

    Rows without a label (-1) are never drawn.
    """
    owner = _owners(digest, len(label))
    first = owner == torch.arange(len(label))
    shuffled = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled[first[shuffled]]
    taken = torch.zeros(len(label), dtype=torch.bool)
    for number in label[label >= 0].unique():
        rows = shuffled[label[shuffled] == number]
        taken[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return taken[owner]


def _owners(digest: Sequence[Any] | None, count: int) -> Tensor:
    """Int64 `[N]`: the first row with the same digest."""
    if digest is None:
        return torch.arange(count)
    first: dict[Any, int] = {}
    return torch.tensor([first.setdefault(each, row) for row, each in enumerate(digest)])


def _counts(split: SplitAccount) -> str:
    said = [f"{split.used} used", f"{len(split.skipped)} skipped"]
    said.append("doubled not known" if split.doubled is None else f"{split.doubled} doubled")
    if split.in_train:
        said.append(f"{split.in_train} also in train")
    if split.unlabelled:
        said.append(f"{split.unlabelled} without a label")
    if split.carved:
        said.append("carved from train")
    return ", ".join(said)
