"""Splits that never mix, and sources of Python objects."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visiondistill.data import Digits, EmbeddedDigits, OwnData, TensorData, Torchvision, in_order
from visiondistill.data.source import carve
from visiondistill.data.views import CenterView, RandomView
from visiondistill.engine.errors import SettingsError


def labels(count: int = 200, classes: int = 7) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(0))


class Ramp:
    """Image `i` is the number `i`; without `targets` where `listed` is False."""

    def __init__(self, label: Tensor, offset: int = 0, listed: bool = True) -> None:
        self.label, self.offset = label, offset
        if listed:
            self.targets = label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), (self.offset + index) / 1000), int(self.label[index])


def numbers(data) -> list[int]:
    return [round(1000 * value) for batch in in_order(data, 16) for value in batch["image"][:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_carving_takes_the_share_of_every_class(fraction: float):
    label = labels()
    taken = carve(label, None, fraction, seed=1)
    for number in range(7):
        whole, part = int((label == number).sum()), int((taken & (label == number)).sum())
        assert part == min(max(1, round(fraction * whole)), whole - 1)
    assert torch.equal(taken, carve(label, None, fraction, seed=1))
    assert not torch.equal(taken, carve(label, None, fraction, seed=2))


def test_carving_leaves_single_images_and_unlabelled_ones():
    taken = carve(torch.tensor([0, 1, 1, -1, -1, -1]), None, 0.99, seed=0)
    assert taken.tolist()[0] is False
    assert taken[1:3].sum() == 1
    assert not taken[3:].any()


def test_doubled_images_stay_on_one_side():
    label = labels(300, 3)
    digest = [row // 3 for row in range(300)]
    for seed in range(5):
        taken = carve(label, digest, 0.3, seed)
        assert all(len(set(taken[row : row + 3].tolist())) == 1 for row in range(0, 300, 3))
        assert 60 < taken.sum() < 120


def test_carved_splits_are_the_whole_once_and_the_test_never_moves():
    data = Ramp(labels())
    first, second = OwnData(data), OwnData(data, split_seed=1)
    for source in (first, second):
        parts = (numbers(part) for part in (source.train(), source.val(), source.test()))
        assert sorted(itertools.chain(*parts)) == list(range(200))
    assert numbers(first.test()) == numbers(second.test())
    assert numbers(first.val()) != numbers(second.val())
    kept = OwnData(data, in_memory=True)
    assert isinstance(kept.train(), TensorData)
    assert [numbers(part) for part in (kept.train(), kept.val(), kept.test())] == [
        numbers(part) for part in (first.train(), first.val(), first.test())
    ]


def test_splits_that_are_given_are_left_alone():
    source = OwnData(Ramp(labels(50)), test=Ramp(labels(20), offset=500))
    assert numbers(source.test()) == list(range(500, 520))
    assert sorted(numbers(source.train()) + numbers(source.val())) == list(range(50))
    account = source.describe()
    assert {name: split.carved for name, split in account.splits.items()} == {
        "train": False,
        "val": True,
        "test": False,
    }
    assert account.classes == tuple("0123456")
    assert account.input_size == (1, 2, 2)


def test_a_split_that_is_not_there_is_refused():
    source = OwnData(Ramp(labels()), val_fraction=0)
    assert source.splits == ("train", "test")
    with pytest.raises(SettingsError, match="no val split, and val_fraction=0"):
        source.val()


def test_labels_are_looked_up_where_no_list_is_given():
    listed, hidden = OwnData(Ramp(labels(60))), OwnData(Ramp(labels(60), listed=False))
    assert numbers(listed.val()) == numbers(hidden.val())
    assert torch.equal(torch.as_tensor(hidden.train().targets), listed.train().targets)


def test_the_stream_of_a_source_carries_its_labels():
    source = OwnData(Ramp(labels(60)))
    batch = next(source.stream(10).open(0, [(0, 10)], seed=0))[0]
    rows = (1000 * batch["image"][:, 0, 0, 0]).round().long()
    assert torch.equal(batch["label"], labels(60)[rows])
    assert set(rows.tolist()) <= set(numbers(source.train()))


def test_the_account_counts_doubles_and_leaks():
    image = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 1, 2, 2).contiguous()
    label = torch.arange(12) % 2
    train = TensorData({"image": image[[0, 1, 2, 3, 0, 0]], "label": label[[0, 1, 2, 3, 0, 0]]})
    test = TensorData({"image": image[[3, 7, 7]], "label": label[[3, 7, 7]]})
    account = OwnData(train, test=test, val_fraction=0, classes=["even", "odd"]).describe()
    assert (account.splits["train"].doubled, account.splits["train"].in_train) == (2, None)
    assert (account.splits["test"].doubled, account.splits["test"].in_train) == (1, 1)
    assert account.splits["train"].per_class == (4, 2)
    assert account.lines() == [
        "OwnData: 2 classes (even, odd), images 1x2x2, in memory",
        "train: 6 used, 0 skipped, 2 doubled",
        " test: 3 used, 0 skipped, 1 doubled, 1 also in train",
    ]
    assert json.loads(json.dumps(account.as_dict()))["splits"]["test"]["used"] == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"classes": ["a", "b"]}, "labels of train are 0 to 6, but there are 2 classes"),
        ({"classes": ["a"] * 7}, "distinct"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"test_fraction": -0.1}, "test_fraction"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, named: str):
    with pytest.raises(SettingsError, match=named):
        OwnData(Ramp(labels()), **arguments)


def test_data_sets_whose_classes_differ_are_refused():
    train, test = Ramp(labels()), Ramp(labels())
    train.classes, test.classes = list("abcdefg"), list("abcdefh")
    with pytest.raises(SettingsError, match=r"between train and test: \['g', 'h'\]"):
        OwnData(train, test=test)
    test.classes = list("bacdefg")
    with pytest.raises(SettingsError, match="the same in another order"):
        OwnData(train, test=test)


def test_images_of_two_shapes_do_not_fit_in_memory():
    with pytest.raises(SettingsError, match=r"shapes \[\(1, 2, 2\), \(1, 3, 2\)\]"):
        OwnData([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 2), 1)], in_memory=True)


def test_floating_images_are_not_rounded_in_memory():
    data = OwnData(Ramp(labels(50)), in_memory=True, val_fraction=0, test_fraction=0).train()
    assert data.columns["image"].dtype == torch.float32
    assert data.columns["image"][:, 0, 0, 0].tolist() == (torch.arange(50) / 1000).tolist()


def test_the_digits_are_those_of_the_package():
    source = EmbeddedDigits(split_seed=3)
    assert source.classes == tuple("0123456789")
    assert source.input_size == (1, 8, 8)
    for name, data in {"train": source.train(), "val": source.val(), "test": source.test()}.items():
        own = Digits(name, split_seed=3) if name != "test" else Digits("test")
        assert torch.equal(data.columns["image"], own.columns["image"])
    few = EmbeddedDigits(labels_per_class=4).describe().splits["train"]
    assert few.unlabelled == 1097 - 40
    assert few.per_class == (4,) * 10


def write_mnist(root: Path, train: int = 60, test: int = 20) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in {"train": train, "t10k": test}.items():
        image = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + image.tobytes())
        number = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + number.tobytes())


def test_torchvision_sets_by_class_name(tmp_path: Path):
    write_mnist(tmp_path)
    source = Torchvision("MNIST", str(tmp_path))
    assert source.classes[3] == "3 - three"
    assert source.input_size == (1, 28, 28)
    assert {name: split.used for name, split in source.describe().splits.items()} == {
        "train": 50,
        "val": 10,
        "test": 20,
    }
    test = source.test()
    assert isinstance(test, TensorData)
    assert test.columns["image"].dtype == torch.uint8
    stored = (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert test.columns["image"].numpy().tobytes() == stored
    read = Torchvision("MNIST", str(tmp_path), in_memory=False)
    for ours, theirs in zip(in_order(read.val(), 4), in_order(source.val(), 4), strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])


def test_torchvision_sets_without_splits_are_carved(tmp_path: Path):
    for number, name in itertools.product(range(10), ("ant", "bee")):
        (tmp_path / name).mkdir(exist_ok=True)
        photo(8, 8).save(tmp_path / name / f"{number}.png")
    source = Torchvision("ImageFolder", str(tmp_path))
    assert source.classes == ("ant", "bee")
    assert not source.describe().in_memory
    assert [len(part) for part in (source.train(), source.val(), source.test())] == [16, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "CIFAR1000"}, "no 'CIFAR1000'; there are .*CIFAR100"),
        ({"name": "CIFAR10"}, r"CIFAR10 in root=.*download=True"),
        ({"name": "Flowers102"}, r"Flowers102 in root=.*download=True"),
        ({"name": "MNIST", "splits": {"train": "all"}}, "'train' and 'test', no 'all'"),
        ({"name": "MNIST", "splits": {"test": "test"}}, "must name train"),
        ({"name": "Flowers102", "splits": {"train": "all"}}, "splits=.*Valid values"),
        ({"name": "MNIST", "options": {"trainn": 1}}, "trainn"),
    ],
)
def test_torchvision_sets_that_are_not_there_are_named(tmp_path: Path, arguments: dict, named: str):
    if arguments["name"] == "MNIST":
        write_mnist(tmp_path)
    with pytest.raises(SettingsError, match=named):
        Torchvision(**{"root": str(tmp_path)} | arguments)


def test_fashion_mnist_as_published(tmp_path: Path, shared_dir: Path):
    raw = shared_dir / "data" / "FashionMNIST" / "raw"
    if not raw.is_dir():
        pytest.skip(f"no FashionMNIST at {raw}")
    there = tmp_path / "FashionMNIST" / "raw"
    there.mkdir(parents=True)
    for packed in raw.glob("*.gz"):
        with gzip.open(packed) as source, open(there / packed.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    account = Torchvision("FashionMNIST", str(tmp_path)).describe()
    assert {name: split.used for name, split in account.splits.items()} == {
        "train": 54_000,
        "val": 6_000,
        "test": 10_000,
    }
    assert account.splits["val"].per_class == (600,) * 10
    assert account.classes[9] == "Ankle boot"
    assert account.splits["test"].in_train == 0


def photo(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(50, 40), (33, 61), (32, 32), (20, 25)])
def test_the_evaluation_view_is_timms(width: int, height: int, interpolation: str):
    from timm.data import create_transform

    theirs = create_transform(32, interpolation=interpolation, crop_pct=0.9, normalize=False)
    ours = CenterView(32, 0.9, interpolation)(photo(width, height))
    assert torch.equal(torch.from_numpy(np.array(ours)).permute(2, 0, 1), theirs(photo(width, height)))


def test_the_random_view_is_a_function_of_its_generator():
    view, image = RandomView((16, 16)), photo(40, 30)

    def look(seed: int) -> np.ndarray:
        return np.asarray(view(image, torch.Generator().manual_seed(seed)))

    before = torch.random.get_rng_state()
    assert np.array_equal(look(0), look(0))
    assert len({look(seed).tobytes() for seed in range(20)}) == 20
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_crops_keep_area_and_ratio_and_stay_inside():
    view, generator = RandomView((8, 8), area=0.25), torch.Generator().manual_seed(0)
    boxes = torch.tensor([view.box(200, 300, generator) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 200).all()
    assert (left + width <= 300).all()
    share, ratio = height * width / 60_000, width / height
    assert share.min() > 0.245
    assert share.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert (top == 200 - height).any()
    assert (top == 0).any()


def test_random_crops_of_very_oblong_images_fall_back_to_the_middle():
    view = RandomView((8, 8), area=0.9)
    assert view.box(10, 100, torch.Generator().manual_seed(0)) == (0, 43, 10, 13)


def test_half_of_the_random_views_are_mirrored():
    left = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (16, 1)))
    generator = torch.Generator().manual_seed(0)
    for flip, low, high in [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)]:
        view = RandomView((8, 8), area=0.5, flip=flip)
        falls = sum(int(np.diff(np.asarray(view(left, generator)).mean(0).astype(float)).sum() < 0) for _ in range(200))
        assert low <= falls <= high
