# ruff: noqa: NPY002 - third-party transforms draw from numpy's legacy generator
from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from visiondistill.data.samples import Samples, collate, to_image


def test_every_form_of_one_picture_is_the_same_tensor():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    expected = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    forms = [
        array,
        Image.fromarray(array),
        torch.from_numpy(array).permute(2, 0, 1),
        array.astype(np.float32) / 255,
        Image.fromarray(array).convert("RGBA"),
    ]
    for form in forms:
        torch.testing.assert_close(to_image(form), expected, rtol=0, atol=1e-7)


def test_grey_pictures_keep_one_channel():
    grey = np.array([[0, 128], [255, 64]], dtype=np.uint8)
    for form in (grey, Image.fromarray(grey), torch.from_numpy(grey)):
        assert torch.equal(to_image(form), torch.from_numpy(grey)[None].float() / 255)
    deep = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert to_image(deep).tolist() == [[[0.0, 1.0]]]
    assert to_image(Image.fromarray(grey).convert("P")).shape == (3, 2, 2)


@pytest.mark.parametrize("image", ["a path", torch.zeros(1, 2, 2, dtype=torch.int64), np.zeros((2, 2), np.int32)])
def test_other_things_are_no_images(image):
    with pytest.raises(TypeError, match="image"):
        to_image(image)


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone():
    def noisy(image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand(1) + float(np.random.rand()) + random.random()

    data = [(torch.zeros(1, 1, 1), 0)] * 3

    def drawn(seed: int, epoch: int, index: int) -> float:
        return Samples(data, noisy, seed)[epoch, index]["image"].item()

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    assert len({drawn(*place) for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}) == 4


def test_a_transform_may_take_a_generator():
    def shifted(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return image + torch.rand(1, generator=generator)

    samples = Samples([(torch.zeros(1, 1, 1), 0)] * 2, shifted, seed=0)
    assert samples[0, 0]["image"] == samples[0, 0]["image"] != samples[0, 1]["image"] != 0


def test_making_a_sample_disturbs_no_generator():
    def greedy(image: torch.Tensor) -> torch.Tensor:
        torch.rand(7), np.random.rand(7), random.random()
        return image

    def states() -> tuple:
        return torch.default_generator.get_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    Samples([(torch.zeros(1, 1, 1), 0)], greedy, seed=0)[0, 0]
    assert states() == before


def test_dicts_keep_their_entries_and_unfit_samples_are_named():
    samples = Samples([{"image": torch.zeros(1, 1, 1), "label": 3, "flip": 1.0}, (1, 2, 3), {"picture": 1}], None, 0)
    assert set(samples[0, 0]) == {"image", "label", "flip", "index"}
    with pytest.raises(TypeError, match=r"sample 1 of list .* tuple"):
        samples[0, 1]
    with pytest.raises(TypeError, match=r"sample 2 of list .*picture"):
        samples[0, 2]


def test_images_of_two_shapes_are_named():
    samples = [{"image": torch.zeros(1, 2, 2), "index": 5}, {"image": torch.zeros(1, 2, 3), "index": 9}]
    with pytest.raises(ValueError, match=r"sample 5 has \(1, 2, 2\), sample 9 has \(1, 2, 3\)"):
        collate(samples)
