from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from visiondistill.augmentors import Augment, Chain, Mix
from visiondistill.augmentors.augment import flipped, inside, shifted, zoomed
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import Draw

EVERYTHING = {
    "flip": 0.5,
    "shift": 3,
    "zoom": 0.3,
    "turn": 20.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "erase": 0.5,
}


def draw(low: int = 0, high: int = 8, seed: int = 0, step: int = 0) -> Draw:
    return Draw(seed, step, {"": (low, high), "train": (low, high)}, 2, torch.device("cpu"))


def images(count: int = 8, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def augmented(augment: Augment, image: Tensor, randomness: Draw) -> dict:
    batch = {"train": {"image": image, "label": torch.zeros(len(image), dtype=torch.int64)}, "val": {}}
    return augment.prepare(batch, randomness, frozenset({"student"}))["train"]


def test_it_is_a_function_of_seed_step_and_row_alone():
    augment, image = Augment(**EVERYTHING), images()
    whole = augmented(augment, image, draw())["image"]
    assert torch.equal(whole, augmented(augment, image, draw())["image"])
    parts = [augmented(augment, image[low : low + 2], draw(low, low + 2))["image"] for low in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    for other in (draw(seed=1), draw(step=1)):
        assert not torch.equal(whole, augmented(augment, image, other)["image"])


def test_every_image_has_a_draw_of_its_own_and_stays_in_range():
    same = images(1).expand(8, -1, -1, -1)
    whole = augmented(Augment(**EVERYTHING), same, draw())["image"]
    assert whole.shape == same.shape
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert all((whole[i] - whole[j]).abs().max() > 0.01 for i in range(8) for j in range(i))


def test_strengths_of_zero_change_no_bit():
    image = images()
    still = augmented(Augment(flip=0), image, draw())
    assert torch.equal(still["image"], image)
    assert still["view"] == {}


def test_the_input_is_left_alone():
    image = images()
    before = image.clone()
    augmented(Augment(**EVERYTHING), image, draw())
    assert torch.equal(image, before)


def test_autocast_does_not_round_the_pixels():
    image = images()
    plain = augmented(Augment(**EVERYTHING), image, draw())["image"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmented(Augment(**EVERYTHING), image, draw())["image"], plain)


def test_flips_are_mirror_images_as_often_as_asked():
    image = images(2000, 1, 2, 3)
    out = augmented(Augment(flip=0.3), image, draw(0, 2000))
    flip = out["view"]["flip"]
    assert torch.equal(out["image"][flip], image[flip].flip(-1))
    assert torch.equal(out["image"][~flip], image[~flip])
    assert abs(flip.double().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


@pytest.mark.parametrize("padding", ["constant", "reflect", "replicate"])
def test_a_shift_is_the_crop_of_a_padded_image(padding: str):
    image, by = images(3), torch.tensor([[2, -1], [0, 0], [-2, 2]])
    out = shifted(image, by, 2, padding)
    assert torch.equal(out[1], image[1])
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[padding]
    for each, (down, right), expected in zip(out, by.tolist(), image, strict=True):
        padded = reference.pad(expected, [2, 2, 2, 2], padding_mode=mode)
        assert torch.equal(each, reference.crop(padded, 2 - down, 2 - right, 12, 10))


def test_shifts_reach_both_ends_equally_often():
    by = augmented(Augment(flip=0, shift=2), images(4000, 1, 6, 6), draw(0, 4000))["view"]["shift"]
    counts = torch.stack([(by == place).double().mean(0) for place in range(-2, 3)])
    assert (counts - 0.2).abs().max() < 5 * math.sqrt(0.16 / 4000)
    assert by.min() == -2
    assert by.max() == 2


def test_images_are_shifted_as_often_as_asked():
    image = images(4000, 1, 6, 6)
    always, seldom = (
        augmented(Augment(flip=0, shift=2, shift_probability=p), image, draw(0, 4000)) for p in (1.0, 0.25)
    )
    same = (seldom["view"]["shift"] == always["view"]["shift"]).all(1)
    # One in 25 shifts is none.
    assert abs(same.double().mean().item() - (0.25 + 0.75 / 25)) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(seldom["image"][~same], image[~same])
    assert torch.equal(seldom["image"][same], always["image"][same])


def test_zoom_of_the_whole_image_is_the_image():
    image = images()
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(8, -1, -1)
    torch.testing.assert_close(zoomed(image, identity), image, rtol=0, atol=1e-5)


def test_zoom_keeps_the_area_that_it_says_and_stays_inside():
    zoom = augmented(Augment(flip=0, zoom=0.4), images(1000, 1), draw(0, 1000))["view"]["zoom"]
    assert (zoom[:, 0, 1] == 0).all()
    assert (zoom[:, 1, 0] == 0).all()
    width, height = zoom[:, 0, 0], zoom[:, 1, 1]
    # A side that would leave the image ends at its edge, so that the area may be less than drawn there.
    assert (width * height).min() > 0.4 * 0.75
    assert (width * height).max() <= 1
    assert ((width / height).log().abs() <= math.log(4 / 3) + 1e-5).all()
    assert (zoom[:, 0, 2].abs() + width <= 1 + 1e-6).all()
    assert (zoom[:, 1, 2].abs() + height <= 1 + 1e-6).all()


def test_a_turn_of_180_degrees_is_both_mirrors(monkeypatch: pytest.MonkeyPatch):
    image, randomness = images(), draw()
    monkeypatch.setattr(Draw, "uniform", lambda self, tag, *shape: torch.ones(8, *shape))
    out = augmented(Augment(flip=0, turn=180), image, randomness)["image"]
    torch.testing.assert_close(out, image.flip(-1, -2), rtol=0, atol=1e-4)


def test_a_turn_keeps_circles_round_in_oblong_images():
    height, width = 40, 20
    y, x = torch.meshgrid(torch.arange(height) - 19.5, torch.arange(width) - 9.5, indexing="ij")
    disc = torch.exp(-(x**2 + y**2) / 18).expand(8, 1, -1, -1)
    out = augmented(Augment(flip=0, turn=90), disc, draw())
    assert out["view"]["zoom"][:, 0, 1].abs().max() > 0.3
    # Further out the image's reflections turn in.
    near = (x**2 + y**2).sqrt() < 9.5
    assert (out["image"] - disc)[..., near].abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("brightness", reference.adjust_brightness),
        ("contrast", reference.adjust_contrast),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_colour_factors_mean_what_they_mean_in_torchvision(name: str, function):
    image, randomness = images(), draw()
    out = augmented(Augment(flip=0, **{name: 0.7}), image, randomness)["image"]
    factors = 0.3 + 1.4 * randomness.of("train").uniform(f"augment.{name}")
    expected = torch.stack([function(each, f) for each, f in zip(image, factors.tolist(), strict=True)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    assert (out - image).abs().max() > 0.1


def test_hue_means_what_it_means_in_torchvision():
    image, randomness = images(), draw()
    out = augmented(Augment(flip=0, hue=0.4), image, randomness)["image"]
    shifts = 0.4 * (2 * randomness.of("train").uniform("augment.hue") - 1)
    expected = torch.stack([reference.adjust_hue(each, s) for each, s in zip(image, shifts.tolist(), strict=True)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    assert (out - image).abs().max() > 0.1


def test_erasing_covers_a_box_with_the_mean_colour():
    image = images(400, 3, 20, 20)
    out = augmented(Augment(flip=0, erase=0.5), image, draw(0, 400))["image"]
    changed = (out != image).any(1)
    erased = changed.flatten(1).any(1)
    assert abs(erased.double().mean().item() - 0.5) < 4 * math.sqrt(0.25 / 400)
    mean = image.mean((-2, -1), keepdim=True).expand_as(image)
    assert torch.equal(out.transpose(0, 1)[:, changed], mean.transpose(0, 1)[:, changed])
    share = changed[erased].flatten(1).double().mean(1)
    assert share.min() > 0.01
    assert share.max() < 0.4


def test_boxes_lie_whole_in_the_image_at_every_place():
    down, right = torch.cartesian_prod(torch.linspace(0, 0.999, 10), torch.linspace(0, 0.999, 5)).T
    box = inside(images(50, 1, 5, 4), torch.full((50,), 0.6), torch.full((50,), 0.5), down, right)
    assert (box.sum((1, 2, 3)) == 3 * 2).all()
    assert box.any(0).all()


def test_flipped_rows_only():
    image = images(2)
    assert torch.equal(flipped(image, torch.tensor([True, False])), torch.stack([image[0].flip(-1), image[1]]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"shift": -1},
        {"padding": "wrap"},
        {"zoom": 0.0},
        {"turn": 181.0},
        {"brightness": -0.1},
        {"contrast": math.inf},
        {"saturation": math.nan},
        {"hue": 0.6},
        {"erase": -1.0},
    ],
)
def test_strengths_out_of_range_are_named(wrong: dict):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Augment(**wrong)


def test_grey_images_have_no_hue():
    with pytest.raises(SettingsError, match="saturation and hue need 3 channels, the images have 1"):
        augmented(Augment(hue=0.1), images(channels=1), draw())
    out = augmented(Augment(flip=0, contrast=0.5, brightness=0.5), images(channels=1), draw())["image"]
    assert out.shape == (8, 1, 12, 10)


def test_a_chain_is_its_parts_in_order():
    batch = {"train": {"image": images(), "label": torch.arange(8)}}
    augment, mix = Augment(), Mix(num_classes=8)
    chained = Chain([augment, mix])
    expected = mix.prepare(augment.prepare(batch, draw(), frozenset()), draw(), frozenset())["train"]
    out = chained.prepare(batch, draw(), frozenset())["train"]
    assert torch.equal(out["image"], expected["image"])
    assert torch.equal(out["target"], expected["target"])
    assert set(out["view"]) == {"flip"}
    assert chained.soft_labels
    assert not Chain([augment]).soft_labels
    with pytest.raises(SettingsError, match="each kind once"):
        Chain([Augment(), Augment()])
