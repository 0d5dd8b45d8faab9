"""`visiondistill store pairs|latents`, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pipeline_folders as folders
import pytest
import torch
from safetensors.torch import load_file

from diffusion.models import CachedLatents, open_generator, open_latents
from diffusion.pairs import Pairs
from visiondistill.cli import main
from visiondistill.data import ImageFolder

CLASSES = 2
OUT = ["--pipeline", "dit", "--file", "out"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a latent pipeline (`dit`), one in pixels (`pixels`), and images (`data`)."""
    from diffusers import DDIMScheduler
    from PIL import Image

    place = tmp_path_factory.mktemp("store")
    folders.dit(place / "dit", classes=CLASSES)
    folders.pixels(place / "pixels", DDIMScheduler(clip_sample=False))
    for number in range(12):
        file = place / "data" / "train" / f"class {number % CLASSES}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * number, 9, 90)).save(file)
    return place


def data(place: Path, size: int = 16) -> list[str]:
    return ["--data.root", str(place / "data"), "--data.size", str(size)]


def test_pairs_are_those_of_the_pipeline_as_it_is_opened(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["store", "pairs", "--pipeline", str(place / "dit"), "--output_dir", str(tmp_path), "--steps", "2"]
    assert main([*words, "--count", "3", "--generator.guidance_scale", "2"]) == 0
    assert f"3 pairs: {tmp_path}" in capsys.readouterr().out
    teacher = open_generator(place / "dit", guidance_scale=2.0)
    held = Pairs(tmp_path, teacher).columns
    condition, null = teacher.conditions.at(range(3), torch.device("cpu"))
    torch.testing.assert_close(held["code"], teacher.sample(held["noise"], condition, null, steps=2))
    assert main([*words, "--count", "5", "--generator.guidance_scale", "2"]) == 0
    again = Pairs(tmp_path, teacher).columns["code"]
    assert len(again) == 5
    assert torch.equal(again[:3], held["code"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name a generator: --run FOLDER, or --pipeline FOLDER"),
        (["--pipeline", "dit"], "say where to: --output_dir DIR"),
        (["--pipeline", "nothing", "--output_dir", "out"], "model_index.json is missing"),
        (["--pipeline", "dit", "--output_dir", "out", "--count", "0"], "need count >= 1"),
        (["--pipeline", "dit", "--output_dir", "out", "--generator.sampler", "student"], "without noise of its own"),
        (["--pipeline", "dit", "--output_dir", "out", "--generator.stepz", "3"], "stepz"),
    ],
)
def test_pairs_that_cannot_be_are_refused(words, told, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = [str(tmp_path) if word == "out" else word for word in words]
    if not words:
        words = ["--output_dir", str(tmp_path)]
    assert main(["store", "pairs", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pairs_of_another_teacher_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--output_dir", str(tmp_path), "--count", "2", "--steps", "1"]
    assert main(["store", "pairs", "--pipeline", str(place / "pixels"), *words]) == 0
    assert main(["store", "pairs", "--pipeline", str(place / "dit"), *words]) == 2
    assert "made otherwise" in capsys.readouterr().err


def test_latents_are_those_that_training_would_make(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "latents.safetensors"
    words = ["--pipeline", str(place / "dit"), "--file", str(file), *data(place), "--batch_size", "5"]
    assert main(["store", "latents", *words]) == 0
    source = ImageFolder(str(place / "data"), size=16)
    assert f"{len(source.train())} latents of [4, 8, 8]: {file}" in capsys.readouterr().out
    teacher = open_generator(place / "dit")
    held = open_latents(file, teacher, source)
    images = torch.stack([source.train()[row]["image"] for row in range(3)])
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    torch.testing.assert_close(held.columns["code"][:3], teacher.codec.encode(images))
    assert len(CachedLatents(source, str(file)).stream(2).data) == len(held)
    assert main(["store", "latents", *words, "--split", "val"]) == 0
    assert len(load_file(file)["code"]) == len(source.val())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--file", "out"], "name a generator: --run FOLDER, or --pipeline FOLDER"),
        (["--pipeline", "dit"], "say where to: --file FILE"),
        (["--pipeline", "dit", "--file", "out"], "data: none are named"),
        ([*OUT, "--data.root", "data", "--data.size", "8"], "images are (3, 8, 8), the codec's are (3, 16, 16)"),
        ([*OUT, "--data.root", "nowhere", "--data.size", "16"], "nowhere"),
        ([*OUT, "--data.root", "data", "--data.size", "16", "--split", "all"], "there is no all split"),
    ],
)
def test_latents_that_cannot_be_are_refused(words, told, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = [str(tmp_path / "latents.safetensors") if word == "out" else word for word in words]
    assert main(["store", "latents", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
