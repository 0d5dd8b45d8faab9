"""Latents on disk: made once, and refused for another codec or other images."""

from __future__ import annotations

import json
from pathlib import Path

import pipeline_folders as folders
import pytest
import torch

from diffusion.codecs import Latents, Pixels
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.models import cache_latents, open_latents
from diffusion.process import FlowProcess
from visiondistill.data import Source, TensorData
from visiondistill.data.source import Split


def generator(seed: int = 0, **kw) -> Generator:
    torch.manual_seed(seed)
    return Generator(Denoiser(torch.nn.Identity(), FlowProcess()), (4, 8, 8), codec=Latents(folders.vae(**kw)))


def source(seed: int = 0, size: int = 16) -> Source:
    pixels = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(seed))
    label = torch.arange(7) % 2
    data = Split(TensorData({"image": pixels, "label": label}), label)
    return Source({"train": data}, ("a", "b"), (3, size, size), val_fraction=0, test_fraction=0)


def test_they_are_the_codecs_and_are_opened_by_what_made_them(tmp_path):
    file = tmp_path / "kept" / "latents.safetensors"
    made = cache_latents(generator(), source(), file, batch_size=3)
    opened = open_latents(file, generator(), source())
    images = source().train().columns["image"]
    for held in (made, opened):
        torch.testing.assert_close(held.columns["code"], generator().codec.encode(images))
        assert held.columns["label"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert opened.rows(torch.tensor([2]))["code"].shape == (1, 4, 8, 8)
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.json"]


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        ({"seed": 1}, {}, "another codec"),
        ({"scaling_factor": 0.5}, {}, "another codec"),
        ({}, {"seed": 1}, "another data"),
    ],
)
def test_another_model_or_other_images_are_refused(tmp_path, model, data, told):
    file = tmp_path / "latents.safetensors"
    cache_latents(generator(), source(), file)
    with pytest.raises(ValueError, match=rf"latents\.safetensors was made with {told}.*cache the latents again"):
        open_latents(file, generator(**model), source(**data))


def test_a_file_that_is_damaged_or_not_whole_is_refused(tmp_path):
    file, manifest = tmp_path / "latents.safetensors", tmp_path / "latents.safetensors.json"
    made = generator()
    cache_latents(made, source(), file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its sha256"):
        open_latents(file, made, source())
    manifest.unlink()
    with pytest.raises(ValueError, match=r"latents\.safetensors\.json is missing"):
        open_latents(file, made, source())


def test_images_of_another_size_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), the codec's are \(3, 16, 16\)"):
        cache_latents(generator(), source(size=8), tmp_path / "latents.safetensors")
    assert not list(Path(tmp_path).iterdir())


def test_the_manifest_tells_ranges_of_pixels_apart(tmp_path):
    told = []
    for low in (-1, 0):
        made = Generator(Denoiser(torch.nn.Identity(), FlowProcess()), (3, 16, 16), codec=Pixels(low, 1))
        cache_latents(made, source(), tmp_path / "pixels.safetensors")
        told.append(json.loads((tmp_path / "pixels.safetensors.json").read_text())["codec"])
    assert told[0] != told[1]
