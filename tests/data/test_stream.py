"""Batches are functions of the seed, the step and the rows, whatever carries them there."""

# ruff: noqa: NPY002 - third-party data sets draw from numpy's legacy generator
from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from visiondistill.data import Stream, TensorData, in_order, stream

SIZE, BATCH = 10, 4
WHOLE, HALVES = [(0, 4)], [(0, 2), (2, 4)]


class Pairs:
    """Map-style: pairs whose images carry the sample's number, with noise from every generator there is."""

    def __init__(self, noise: bool = False, targets: list[int] | None = None) -> None:
        self.noise = noise
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(1).item() + np.random.rand() + random.random() if self.noise else 0.0
        return torch.full((1, 2, 2), index / SIZE) + noise, index % 3


def in_memory() -> TensorData:
    samples = [Pairs()[index] for index in range(SIZE)]
    return TensorData(
        {"image": torch.stack([image for image, _ in samples]), "label": torch.tensor([label for _, label in samples])}
    )


def read(source: Stream, start: int, steps: int, rows=WHOLE, seed: int = 0) -> list[list[dict]]:
    return list(itertools.islice(source.open(start, rows, seed), steps))


def same(one: list[list[dict]], other: list[list[dict]]) -> bool:
    flat_one, flat_other = (list(itertools.chain.from_iterable(each)) for each in (one, other))
    return len(flat_one) == len(flat_other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(flat_one, flat_other, strict=True)
    )


@pytest.fixture(params=["memory", "map"])
def source(request) -> Stream:
    return Stream(in_memory() if request.param == "memory" else Pairs(), BATCH)


def test_every_sample_comes_once_per_epoch(source):
    index = torch.cat([part["index"] for (part,) in read(source, 0, 10)])
    for epoch in index.view(4, SIZE):
        assert sorted(epoch.tolist()) == list(range(SIZE))


def test_batches_hold_what_is_promised(source):
    for (batch,) in read(source, 0, 5):
        assert batch["image"].shape == (BATCH, 1, 2, 2)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        torch.testing.assert_close(batch["image"][:, 0, 0, 0], batch["index"] / SIZE)
        assert torch.equal(batch["label"], batch["index"] % 3)


@pytest.mark.parametrize("start", [1, 3, 77])
def test_a_step_does_not_depend_on_what_was_read_before(source, start):
    assert same(read(source, 0, start + 4)[start:], read(source, start, 4))


def test_parts_of_a_batch_are_its_rows(source):
    for (whole,), halves in zip(read(source, 2, 5), read(source, 2, 5, HALVES), strict=True):
        assert same([[whole]], [[{name: torch.cat([half[name] for half in halves]) for name in whole}]])
    last_rows = [[parts[1]] for parts in read(source, 2, 5, HALVES)]
    assert same(last_rows, read(source, 2, 5, [(2, 4)]))


def test_seeds_give_other_orders(source):
    assert not same(read(source, 0, 3), read(source, 0, 3, seed=1))


def test_memory_and_map_style_give_the_same_batches():
    assert same(read(Stream(in_memory(), BATCH), 0, 12), read(Stream(Pairs(), BATCH), 0, 12))


def test_reading_ahead_changes_nothing_and_costs_views_only(monkeypatch):
    ahead = read(Stream(in_memory(), BATCH), 5, 12)
    storages = {part["image"].untyped_storage().data_ptr() for (part,) in ahead}
    assert len(storages) == 1
    monkeypatch.setattr(stream, "AHEAD_STEPS", 5)
    assert same(ahead, read(Stream(in_memory(), BATCH), 5, 12))
    monkeypatch.setattr(stream, "AHEAD_BYTES", 1)
    assert same(ahead, read(Stream(in_memory(), BATCH), 5, 12))


def test_the_number_of_workers_and_a_resume_change_nothing():
    alone = read(Stream(Pairs(noise=True), BATCH), 0, 8, HALVES)
    assert same(alone, read(Stream(Pairs(noise=True), BATCH, workers=2), 0, 8, HALVES))
    assert same(alone[3:], read(Stream(Pairs(noise=True), BATCH, workers=1), 3, 5, HALVES))
    first_epoch, second_epoch = (dict(epoch) for epoch in _by_epoch(alone))
    assert all(first_epoch[index] != second_epoch[index] for index in first_epoch)


def _by_epoch(steps: list[list[dict]]) -> list[list[tuple[int, float]]]:
    rows = [
        (int(index), float(image[0, 0, 0]))
        for parts in steps
        for part in parts
        for index, image in zip(part["index"], part["image"], strict=True)
    ]
    return [rows[:SIZE], rows[SIZE : 2 * SIZE]]


def test_a_transform_is_applied_to_tensors_in_memory_too():
    plain, brighter = Stream(in_memory(), BATCH), Stream(in_memory(), BATCH, transform=lambda image: image + 1)
    for (one,), (other,) in zip(read(plain, 0, 4), read(brighter, 0, 4), strict=True):
        assert torch.equal(one["image"] + 1, other["image"])
        assert torch.equal(one["index"], other["index"])


@pytest.mark.parametrize("noise", [False, True])
def test_reading_disturbs_no_generator(noise):
    before = torch.default_generator.get_state()
    read(Stream(Pairs(noise), BATCH), 0, 3)
    read(Stream(in_memory(), BATCH), 0, 3)
    list(in_order(Pairs(noise), 3))
    assert torch.equal(torch.default_generator.get_state(), before)


@pytest.mark.parametrize("data", [in_memory(), Pairs()])
def test_in_order_gives_every_sample_once(data):
    batches = list(in_order(data, 4))
    assert [len(batch["index"]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(SIZE))


def test_labelled_fraction_comes_from_the_data_or_the_user():
    assert Stream(Pairs(), BATCH).labelled_fraction == 1.0
    assert Stream(Pairs(targets=[0, 1, -1, -1, 2] * 2), BATCH).labelled_fraction == 0.6
    assert Stream(Pairs(targets=[-1] * SIZE), BATCH).labelled_fraction == 0.0
    assert Stream(Pairs(), BATCH, labelled_fraction=0.3).labelled_fraction == 0.3


def test_a_batch_larger_than_the_set_is_said_aloud():
    large = Stream(Pairs(), 25)
    with pytest.warns(UserWarning, match="batch_size=25 is larger than the 10 samples of Pairs"):
        parts = read(large, 0, 2, [(0, 25)])
    index = torch.cat([part["index"] for (part,) in parts])
    assert index.bincount().tolist() == [5] * SIZE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": [], "batch_size": 4}, "data set list is empty"),
        ({"data": Pairs(), "batch_size": 0}, "batch_size >= 1"),
        ({"data": Pairs(), "batch_size": 2, "workers": -1}, "workers >= 0"),
        (
            {"data": Pairs(), "batch_size": 2, "labelled_fraction": 1.5},
            r"labelled_fraction must be in \[0, 1\], got 1.5",
        ),
    ],
)
def test_unfit_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stream(**arguments)
