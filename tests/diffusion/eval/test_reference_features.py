"""Features of real images: what they are kept by, and that none is read that does not belong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.eval import FeatureSet, RandomExtractor, Reference, collect, reference_features
from diffusion.eval import reference as module
from visiondistill.data import EmbeddedDigits, OwnData, TensorData


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that features are made."""
    made: list[int] = []

    def counted(*args: object) -> object:
        made.append(1)
        return collect(*args)

    monkeypatch.setattr(module, "collect", counted)
    return made


def test_features_are_made_once(tmp_path: Path, real_images: Callable[..., Tensor], passes: list[int]):
    first = reference_features(Reference.of(real_images(30)), RandomExtractor(), tmp_path)
    again = reference_features(Reference.of(real_images(30)), RandomExtractor(), tmp_path)
    assert len(passes) == 1
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.label, again.label)
    reference_features(Reference.of(real_images(30)), RandomExtractor())
    assert len(passes) == 2, "without a cache nothing is kept"


def test_the_key_is_the_contents_and_the_extractor(
    tmp_path: Path, real_images: Callable[..., Tensor], passes: list[int]
):
    images = real_images(30)
    changed = images.clone()
    changed[17, 0, 3, 3] += 1
    labelled = TensorData({"image": images, "label": torch.arange(30)})
    for reference, extractor in (
        (Reference.of(images), RandomExtractor()),
        (Reference.of(changed), RandomExtractor()),
        (Reference.of(images[:29]), RandomExtractor()),
        (Reference.of(images.flip(0)), RandomExtractor()),
        (Reference.of(images.view(30, 1, 4, 16)), RandomExtractor()),
        (Reference(labelled, {}), RandomExtractor()),
        (Reference.of(images), RandomExtractor(seed=1)),
        (Reference.of(images), RandomExtractor(size=16)),
    ):
        reference_features(reference, extractor, tmp_path)
    assert len(passes) == 8
    assert len(list(tmp_path.iterdir())) == 8


def test_what_is_read_does_not_depend_on_how(tmp_path: Path, real_images: Callable[..., Tensor], passes: list[int]):
    images = real_images(30)
    floating = Reference.of(images.float() / 255)
    in_pieces = Reference(TensorData({"image": images}), {}, batch_size=7)
    assert Reference.of(images).sha256 == floating.sha256 == in_pieces.sha256
    reference_features(in_pieces, RandomExtractor(), tmp_path)
    reference_features(floating, RandomExtractor(), tmp_path)
    assert len(passes) == 1


def test_an_entry_of_other_images_is_never_read(tmp_path: Path, real_images: Callable[..., Tensor], passes: list[int]):
    """Under the right name, whole, and yet not what it should be."""
    ours, theirs = (Reference.of(real_images(30, seed)) for seed in (1, 2))
    expected = reference_features(ours, RandomExtractor(), tmp_path)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    reference_features(theirs, RandomExtractor(), tmp_path)
    next(tmp_path.iterdir()).rename(folder)
    passes.clear()
    assert torch.equal(reference_features(ours, RandomExtractor(), tmp_path).features, expected.features)
    assert len(passes) == 1


def test_a_damaged_entry_is_made_anew(tmp_path: Path, real_images: Callable[..., Tensor], passes: list[int]):
    reference = Reference.of(real_images(30))
    expected = reference_features(reference, RandomExtractor(), tmp_path)
    file = next(tmp_path.glob("*/features.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="made anew"):
        again = reference_features(reference, RandomExtractor(), tmp_path)
    assert torch.equal(again.features, expected.features)
    reference_features(reference, RandomExtractor(), tmp_path)
    assert len(passes) == 2, "the good one replaced it"


def test_a_source_gives_the_split_asked_for(passes: list[int]):
    source = EmbeddedDigits()
    sizes = {split: len(Reference.of(source, split).data) for split in ("train", "val", "test")}
    assert len(set(sizes.values())) == 3
    reference = Reference.of(source, "val")
    assert reference.info == {"type": "EmbeddedDigits", "split": "val", "images": sizes["val"]}
    held = reference_features(reference, RandomExtractor())
    assert isinstance(held, FeatureSet)
    assert torch.equal(held.label, source.split("val").label)
    assert reference.size == tuple(next(reference.batches())[0].shape[1:])


def test_a_split_that_is_not_there_is_refused():
    images = TensorData({"image": torch.rand(40, 1, 2, 2), "label": torch.arange(40) % 2})
    with pytest.raises(ValueError, match="no val split"):
        Reference.of(OwnData(images, val_fraction=0), "val")


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.5])
def test_pixels_out_of_range_are_refused(value: float, real_images: Callable[..., Tensor]):
    images = real_images(30).float() / 255
    images[20, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"1 of 30 images .* number 20"):
        reference_features(Reference.of(images), RandomExtractor())
