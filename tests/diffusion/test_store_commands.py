"""`visiondistill store pairs|latents|prompts`, as a user types it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pipeline_folders as folders
import pytest
import torch
from safetensors.torch import load_file

from diffusion.models import CachedLatents, open_generator, open_latents
from diffusion.models import prompts as prompts_module
from diffusion.models.folder import store_prompts
from diffusion.pairs import Pairs
from visiondistill import recipes
from visiondistill.cli import main
from visiondistill.data import ImageFolder

CLASSES = 2
OUT = ["--pipeline", "dit", "--file", "out"]
TEXTS = ["a red cat", "a blue dog", "on grass"]
CAPTIONS = [TEXTS[number % 2] for number in range(12)]
"""Of the images, in the order in which they are listed."""
PROMPTS = ["--pipeline", "sd", "--prompts", "prompts.txt", "--output_dir", "out"]
CAPTIONED = ["--pipeline", "sd", "--file", "out", "--data.root", "data", "--data.size", "16"]
CAPTIONED += ["--generator.prompts", "prompts.txt", "--captions"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with latent pipelines (`dit`; `sd` with text), one in pixels (`pixels`), and images (`data`)."""
    from diffusers import DDIMScheduler
    from PIL import Image

    place = tmp_path_factory.mktemp("store")
    folders.dit(place / "dit", classes=CLASSES)
    folders.stable_diffusion(place / "sd")
    (place / "prompts.txt").write_text("\n".join(TEXTS))
    (place / "captions.txt").write_text("\n".join(CAPTIONS))
    (place / "few.txt").write_text("\n".join(CAPTIONS[1:]))
    (place / "unknown.txt").write_text("\n".join(["a green cat", *CAPTIONS[1:]]))
    (place / "gap.txt").write_text("\n".join([CAPTIONS[0], "", *CAPTIONS[2:]]))
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
    assert "to train on them" not in capsys.readouterr().out
    assert len(load_file(file)["code"]) == len(source.val())


def test_what_is_printed_trains_on_the_latents(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = shutil.copytree(place / "data", tmp_path / "my photos")
    words = ["--pipeline", str(place / "dit"), "--file", "the latents.safetensors", "--data.size", "16"]
    assert main(["store", "latents", *words, "--data.root", photos.name, "--data.val_fraction", "0.25"]) == 0
    told, options = capsys.readouterr().out.splitlines()[-1].split(": ", 1)
    assert told == "to train on them, give `visiondistill train` these options"
    for recipe in ("denoising", "dmd2"):
        data = recipes.source_of(recipes.override(recipes.load(recipe), recipes.parse_overrides(shlex.split(options))))
        assert isinstance(data, CachedLatents)
        assert data.stream(2).data.file == Path("the latents.safetensors")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--file", "out"], "name a generator: --run FOLDER, or --pipeline FOLDER"),
        (["--pipeline", "dit"], "say where to: --file FILE"),
        (["--pipeline", "dit", "--file", "out"], "data: none are named"),
        (["--pipeline", "sd", "--file", "out"], "one prompt a line (--generator.prompts FILE for evaluate and store"),
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


def test_captions_are_kept_as_the_prompts_that_they_are(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    file = tmp_path / "latents.safetensors"
    words = [str(file) if word == "out" else word for word in CAPTIONED]
    assert main(["store", "latents", *words, "captions.txt"]) == 0
    source = ImageFolder("data", size=16)
    held = load_file(file)
    listed = source.split("train").origin.row.tolist()
    assert len(listed) < len(CAPTIONS), "some images are carved off"
    assert [TEXTS[row] for row in held["prompt"]] == [CAPTIONS[number] for number in listed]
    teacher = open_generator("sd", prompts="prompts.txt")
    assert torch.equal(open_latents(file, teacher, source).columns["prompt"], held["prompt"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*CAPTIONED, "few.txt"], "11 captions for 12 images"),
        ([*CAPTIONED, "unknown.txt"], "none of the 3 prompts, such as 'a green cat'"),
        ([*CAPTIONED, "gap.txt"], "captions gap.txt: line 2 is empty"),
        ([*CAPTIONED, "nothing.txt"], "captions nothing.txt cannot be read"),
        ([*OUT, "--data.root", "data", "--data.size", "16", "--captions", "captions.txt"], "is conditioned on prompts"),
    ],
)
def test_captions_that_do_not_fit_are_refused(words, told, place, tmp_path, monkeypatch, capsys):
    test_latents_that_cannot_be_are_refused(words, told, place, tmp_path, monkeypatch, capsys)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts of pipelines that were loaded, in their order."""
    from diffusion.models import folder

    names, load = [], folder.load_model
    monkeypatch.setattr(folder, "load_model", lambda part, source: names.append(part.name) or load(part, source))
    return names


def test_kept_prompts_are_those_of_the_pipeline(place, tmp_path, loaded, monkeypatch, capsys):
    monkeypatch.chdir(place)
    kept = tmp_path / "kept"
    kept.mkdir()
    words = ["store", "prompts", *[str(kept) if word == "out" else word for word in PROMPTS], "--batch_size", "2"]
    assert main(words) == 0
    assert f"3 prompts: {kept}" in capsys.readouterr().out
    assert loaded == ["text_encoder"], "no network, no autoencoder"
    assert sorted(path.name for path in kept.iterdir()) == ["embeddings.safetensors", "prompts.json"]
    assert list(tmp_path.iterdir()) == [kept], "nothing unfinished is left"
    manifest = json.loads((kept / "prompts.json").read_text())
    assert set(manifest) == {"encoders", "prompts", "count", "max_length", "sha256"}
    assert (manifest["count"], manifest["max_length"]) == (3, 12)

    loaded.clear()
    teacher = open_generator("sd", prompts="prompts.txt", cache=str(kept))
    assert sorted(loaded) == ["unet", "vae"], "the text encoder is not loaded"
    assert main(words) == 0
    assert sorted(loaded) == ["unet", "vae"], "and nothing is made twice"
    loaded.clear()
    plain = open_generator("sd", prompts="prompts.txt")
    assert sorted(loaded) == ["text_encoder", "unet", "vae"]
    rows = range(3), torch.device("cpu")
    for ours, theirs in zip(teacher.conditions.at(*rows), plain.conditions.at(*rows), strict=True):
        torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    assert teacher.conditions.encoders == plain.conditions.encoders, "for an export"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (PROMPTS[2:], "name the pipeline: --pipeline FOLDER"),
        ([*PROMPTS[:2], *PROMPTS[4:]], "name the prompts: --prompts FILE"),
        (PROMPTS[:4], "say where to: --output_dir DIR"),
        (["--pipeline", "dit", *PROMPTS[2:]], "dit has no text encoder"),
        ([*PROMPTS[:3], "nothing.txt", *PROMPTS[4:]], "prompts nothing.txt cannot be read"),
        ([*PROMPTS, "--batch_size", "0"], "batch_size=0 is not allowed"),
    ],
)
def test_prompts_that_cannot_be_are_refused(words, told, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["store", "prompts", *[str(tmp_path / "kept") if word == "out" else word for word in words]]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words, kept = [str(tmp_path) if word == "out" else word for word in PROMPTS], tmp_path / "embeddings.safetensors"
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["store", "prompts", *words]) == 2
    assert "is no folder of prompts" in capsys.readouterr().err
    (tmp_path / "mine.txt").unlink()
    assert main(["store", "prompts", *words]) == 0

    content = kept.read_bytes()
    assert main(["store", "prompts", *[{"prompts.txt": "captions.txt"}.get(word, word) for word in words]]) == 2
    assert "was not made with the prompts of captions.txt" in capsys.readouterr().err
    assert kept.read_bytes() == content
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["store", "prompts", *words]) == 2
    assert "embeddings.safetensors is missing or damaged" in capsys.readouterr().err


def test_other_encoders_and_other_sizes_are_refused(place: Path, tmp_path: Path):
    prompts, kept = str(place / "prompts.txt"), str(tmp_path / "kept")
    store_prompts(place / "sd", prompts, kept)
    for part, field, value in (("text_encoder", "hidden_act", "relu"), ("unet", "sample_size", 16)):
        other = tmp_path / part
        shutil.copytree(place / "sd", other)
        config = other / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
        with pytest.raises(ValueError, match=f"kept was not made with the encoders of .*{part}"):
            open_generator(other, prompts=prompts, cache=kept)


def test_what_is_interrupted_leaves_no_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("diffusion.models.prompts.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        store_prompts(place / "sd", place / "prompts.txt", tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_of_two_processes_that_keep_the_same_the_first_ones_folder_stays(place, tmp_path, monkeypatch):
    kept, encode = tmp_path / "kept", prompts_module._encoded

    def while_another_does(*given: object) -> object:
        monkeypatch.setattr(prompts_module, "_encoded", encode)
        store_prompts(place / "sd", place / "prompts.txt", kept)
        return encode(*given)

    monkeypatch.setattr(prompts_module, "_encoded", while_another_does)
    store_prompts(place / "sd", place / "prompts.txt", kept)
    assert list(tmp_path.iterdir()) == [kept]
    open_generator(place / "sd", prompts=str(place / "prompts.txt"), cache=str(kept))
