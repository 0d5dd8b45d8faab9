from __future__ import annotations

import pytest
import torch

from visiondistill.data import Digits

CLASS_COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def pictures(data: Digits) -> list[tuple]:
    """Content, so that splits can be compared across objects (no two digits of the set are equal)."""
    return [(*image.flatten().tolist(), int(label)) for image, label in zip(*data.columns.values(), strict=True)]


def test_the_splits_are_the_whole_set_once():
    splits = {name: Digits(name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 1097, "val": 200, "test": 500}
    everything = [picture for split in splits.values() for picture in pictures(split)]
    assert len(set(everything)) == 1797
    labels = torch.cat([split.columns["label"] for split in splits.values()])
    assert labels.bincount().tolist() == CLASS_COUNTS


def test_test_and_validation_are_stratified():
    assert Digits("test").columns["label"].bincount().tolist() == [50] * 10
    assert Digits("val").columns["label"].bincount().tolist() == [20] * 10


def test_the_test_set_never_moves_and_validation_moves_with_its_seed():
    assert pictures(Digits("test", split_seed=1)) == pictures(Digits("test"))
    assert pictures(Digits("val", split_seed=1)) != pictures(Digits("val"))
    assert not set(pictures(Digits("val", split_seed=1))) & set(pictures(Digits("train", split_seed=1)))


def test_images_are_grey_in_the_unit_interval():
    image = Digits("train").columns["image"]
    assert image.shape == (1097, 1, 8, 8)
    assert image.dtype == torch.float32
    assert (image.min(), image.max()) == (0, 1)
    assert torch.equal(image * 16, (image * 16).round())


def test_few_labels_per_class():
    full, few = Digits("train").columns, Digits("train", labels_per_class=5).columns
    labelled = few["label"] >= 0
    assert few["label"][labelled].bincount().tolist() == [5] * 10
    assert torch.equal(few["label"][labelled], full["label"][labelled])
    assert torch.equal(few["image"], full["image"])
    assert Digits("train", labels_per_class=5).labelled_fraction == pytest.approx(50 / 1097)

    dropped = Digits("train", labels_per_class=5, unlabelled="drop").columns
    assert torch.equal(dropped["image"], few["image"][labelled])
    assert torch.equal(dropped["label"], few["label"][labelled])

    other = Digits("train", labels_per_class=5, label_seed=1).columns["label"]
    assert not torch.equal(other >= 0, labelled)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "'train', 'val' or 'test', got 'training'"),
        ({"split": "val", "labels_per_class": 5}, "for split='train'"),
        ({"split": "train", "labels_per_class": 0}, "in 1 to "),
        ({"split": "train", "labels_per_class": 500}, "in 1 to 1"),
    ],
)
def test_unfit_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)
