"""Synthetic signs: a function of the arguments, centred to train on, anywhere within the canvas to test on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from visiondistill.data import Glyphs
from visiondistill.data.glyphs import CANVAS, MARGIN, SHAPES, SIDE, _templates, glyphs


def found(image: Tensor, label: Tensor) -> Tensor:
    """Where each sign lies, by the best match with its own shape: `[N, 2]`, down and right of the centre."""
    shape = interpolate(_templates()[:, None], (SIDE, SIDE), mode="bilinear", align_corners=True)
    match = conv2d(image, shape - shape.mean((2, 3), keepdim=True))[torch.arange(len(label)), label]
    best = match.flatten(1).argmax(1)
    return torch.stack([best // match.shape[-1], best % match.shape[-1]], 1) - MARGIN


def test_images_are_a_function_of_the_arguments() -> None:
    first, again, other = (glyphs(50, 3, seed).columns for seed in (1, 1, 2))
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].shape == (50, 1, CANVAS, CANVAS)
    assert 0 <= first["image"].min() < first["image"].max() <= 1
    assert first["label"].bincount().tolist() == [5] * len(SHAPES)


def test_signs_differ() -> None:
    shapes = _templates().flatten(1)
    assert torch.cdist(shapes, shapes, p=1).fill_diagonal_(9).min() >= 2


def test_signs_lie_in_the_centre_or_are_spread_evenly_as_far_as_the_canvas_goes() -> None:
    centred, shifted = (glyphs(4000, shift, 0).columns for shift in (0, MARGIN))
    assert (found(**centred).abs() <= 1).all(1).double().mean() > 0.8
    places = found(**shifted)
    for axis in (0, 1):
        counts = (places[:, axis] + MARGIN).bincount()
        assert len(counts) == 2 * MARGIN + 1
        assert counts.min() > 0.75 * 4000 / len(counts)
        assert counts.max() < 1.25 * 4000 / len(counts)


def test_only_test_images_are_shifted_and_splits_are_drawn_apart() -> None:
    source = Glyphs(train=200, val=100, test=200, test_shift=6)
    assert source.splits == ("train", "val", "test")
    away = [
        found(**split.columns).abs().sum(1).double().mean() for split in (source.train(), source.val(), source.test())
    ]
    assert max(away[:2]) < 2 < 4 < away[2]
    account = source.describe()
    assert [account.splits[name].in_train for name in ("val", "test")] == [0, 0]
    assert account.input_size == (1, CANVAS, CANVAS)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 5, "shift": 7}])
def test_numbers_outside_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="need count"):
        glyphs(**wrong)
