"""Latents on disk: made once, and refused for another codec or other images."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pipeline_folders as folders
import pytest
import torch
from PIL import Image

from diffusion.codecs import Latents, Pixels
from diffusion.conditions import Prompts
from diffusion.critics import GAN
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.methods import DMD2, Denoising
from diffusion.models import CachedLatents, cache_latents, open_generator, open_latents
from diffusion.process import FlowProcess
from visiondistill import recipes, schema
from visiondistill.data import ImageFolder, Pruned, Source, Split, TensorData
from visiondistill.engine import Optim, Run, Stage, train
from visiondistill.schema import RecipeError


def generator(seed: int = 0, **kw) -> Generator:
    torch.manual_seed(seed)
    return Generator(Denoiser(torch.nn.Identity(), FlowProcess()), (4, 8, 8), codec=Latents(folders.vae(**kw)))


def prompted(*texts: str) -> Generator:
    """With prompts, whose embeddings are their numbers."""
    words, made = torch.arange(len(texts))[:, None], generator()
    made.conditions = Prompts(texts, {"words": words}, {"words": torch.tensor([[-1]])})
    return made


def source(seed: int = 0, size: int = 16, **kw) -> Source:
    pixels = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(seed))
    label = torch.arange(7) % 2
    data = Split(TensorData({"image": pixels, "label": label}), label)
    return Source({"train": data} | ({} if kw else {"val": data}), ("a", "b"), (3, size, size), test_fraction=0, **kw)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A latent pipeline with two classes."""
    return folders.dit(tmp_path_factory.mktemp("pipeline") / "dit", classes=2)


def losses(method: Denoising | DMD2, folder: Path) -> list[dict[str, float]]:
    run = Run(str(folder), 4, log_every=1, progress=False, device="cpu", proof_window=0)
    history = train([Stage(method, 3, {"default": Optim("adam", lr=1e-3)})], run).history
    return [{name: value for name, value in line.items() if "/" in name} for line in history]


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
    with pytest.raises(ValueError, match=rf"latents\.safetensors was made with {told}.*make it anew"):
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


# --- as data


def test_training_images_are_codes_and_all_others_images(tmp_path):
    file = tmp_path / "latents.safetensors"
    made = cache_latents(generator(), source(), file)
    cached = CachedLatents(source(), str(file))
    (batch,) = next(cached.stream(4).open(0, [(0, 4)], 0))
    assert set(batch) == {"code", "label", "index"}
    assert torch.equal(batch["code"], made.columns["code"][batch["index"]])
    (images,) = next(cached.stream(4, split="val").open(0, [(0, 4)], 0))
    assert images["image"].shape == (4, 3, 16, 16)
    assert torch.equal(cached.train().columns["image"], source().train().columns["image"]), "to be evaluated"
    assert (cached.classes, cached.input_size, cached.crop) == (("a", "b"), (3, 16, 16), source().crop)
    assert f"train: latents of 7 images from {file}" in cached.describe().lines()
    contents = {data.stream(4).contents for data in (source(), cached)}
    cache_latents(generator(1), source(), file)
    assert len(contents | {CachedLatents(source(), str(file)).stream(4).contents}) == 3, "a resumed run must have these"


@pytest.mark.parametrize("name", ["denoising", "dmd2"])
def test_a_run_is_the_same_with_and_without_them(tmp_path, pipeline, name):
    file, histories = tmp_path / "latents.safetensors", []
    cache_latents(open_generator(pipeline), source(), file)
    for place, data in enumerate((source(), CachedLatents(source(), str(file)))):
        teacher, streams = open_generator(pipeline), {"train": data.stream(4)}
        torch.manual_seed(0)
        gan = GAN(taps=["transformer_blocks.1"])
        made = Denoising(teacher, streams) if name == "denoising" else DMD2(teacher, streams=streams, gan=gan)
        histories.append(losses(made, tmp_path / str(place)))
    plain, cached = histories
    assert len(plain) == 3
    for one, other in zip(plain, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_other_images_are_refused_when_the_data_are_built(tmp_path):
    file = tmp_path / "latents.safetensors"
    cache_latents(generator(), source(), file)
    told = rf"made with another data.*visiondistill store latents --pipeline .*--file {file}"
    with pytest.raises(ValueError, match=told):
        CachedLatents(source(1), str(file))
    with pytest.raises(ValueError, match=r"nothing\.safetensors is missing; make it anew: visiondistill store latents"):
        CachedLatents(source(), str(tmp_path / "nothing.safetensors"))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Pruned(data, 0.5)], ids=["whole", "pruned"])
@pytest.mark.parametrize("method", [Denoising, lambda teacher, streams: DMD2(teacher, streams=streams, gan=GAN())])
def test_another_codec_is_refused_by_the_method_that_reads_them(tmp_path, pipeline, method, wrap):
    file = tmp_path / "latents.safetensors"
    cache_latents(generator(scaling_factor=0.5), source(), file)
    streams = {"train": wrap(CachedLatents(source(), str(file))).stream(4)}
    told = rf"made with another codec.*visiondistill store latents --pipeline .*--file {file}"
    with pytest.raises(ValueError, match=told):
        method(open_generator(pipeline), streams)
    DMD2(open_generator(pipeline), streams=streams)  # it reads none


def test_a_recipe_names_the_whole_set_and_the_file(tmp_path, pipeline):
    digits = {"class_path": "visiondistill.data.EmbeddedDigits"}
    file = tmp_path / "latents.safetensors"
    node = {"class_path": "diffusion.models.CachedLatents", "init_args": {"source": digits, "file": str(file)}}
    with pytest.raises(RecipeError, match=r"data: .*latents\.safetensors is missing"):
        recipes.source_of({"data": node})
    eight = Generator(Denoiser(torch.nn.Identity(), FlowProcess()), (1, 8, 8))
    cache_latents(eight, recipes.source_of({"data": digits}), file)
    assert recipes.source_of({"data": node}).input_size == (1, 8, 8)


def test_what_its_help_shows_is_a_recipes_data():
    shown = re.search(r"In a recipe:\n\n(.*?)\n\n", CachedLatents.__doc__, re.DOTALL)[1]
    node = recipes.parse_overrides(["--whole", textwrap.dedent(shown)])["whole"]["data"]
    schema.check(node, Source, "data")
    assert node["class_path"] == f"diffusion.models.{CachedLatents.__name__}"


# --- with captions

TEXTS = ["a red cat", "a blue dog", "on grass"]
SHOWN = [2, 0, 1, 1, 0, 2, 0]
CAPTIONS = [TEXTS[row] for row in SHOWN]


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> tuple[Path, str]:
    """A latent pipeline with text encoders, and the file of its prompts."""
    place = tmp_path_factory.mktemp("worded")
    (place / "prompts.txt").write_text("\n".join(TEXTS))
    return folders.stable_diffusion(place / "sd"), str(place / "prompts.txt")


def test_captions_become_the_conditions_of_their_images(tmp_path):
    file, made = tmp_path / "latents.safetensors", prompted(*TEXTS)
    assert cache_latents(made, source(), file, captions=CAPTIONS).columns["prompt"].tolist() == SHOWN
    cached = CachedLatents(source(), str(file))
    (batch,) = next(cached.stream(7).open(0, [(0, 7)], 0))
    condition, null = made.conditions.of(batch)
    assert condition["words"][:, 0].tolist() == [SHOWN[row] for row in batch["index"].tolist()]
    assert null["words"].tolist() == [[-1]] * 7
    assert f"train: latents of 7 images with their captions from {file}" in cached.describe().lines()
    plain = cached.stream(4).contents
    cache_latents(made, source(), file, captions=CAPTIONS[::-1])
    assert CachedLatents(source(), str(file)).stream(4).contents != plain, "a resumed run must have the same"


def test_captions_are_listed_for_images_that_were_carved_off_too(tmp_path):
    carved = source(val_fraction=0.3)
    kept = carved.split("train").origin.row.tolist()
    assert len(kept) < 7
    made = cache_latents(prompted(*TEXTS), carved, tmp_path / "latents.safetensors", captions=CAPTIONS)
    assert made.columns["prompt"].tolist() == [SHOWN[row] for row in kept]
    made = cache_latents(prompted(*TEXTS), carved, tmp_path / "val.safetensors", split="val", captions=CAPTIONS)
    assert made.columns["prompt"].tolist() == [SHOWN[row] for row in range(7) if row not in kept]


def test_a_caption_that_is_there_twice_among_the_prompts_is_the_first():
    assert prompted("a", "b", "a").conditions.rows(["a", "b", "a"]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("texts", [TEXTS[::-1], [*TEXTS, "a red dog"]], ids=["another order", "one more"])
def test_captions_of_other_prompts_are_refused(tmp_path, texts):
    file = tmp_path / "latents.safetensors"
    cache_latents(prompted(*TEXTS), source(), file, captions=CAPTIONS)
    open_latents(file, prompted(*TEXTS), source())
    with pytest.raises(ValueError, match=r"latents\.safetensors was made with another prompts .*--captions FILE"):
        open_latents(file, prompted(*texts), source())
    cache_latents(prompted(*TEXTS), source(), file)
    held = open_latents(file, prompted(*texts), source())  # without captions they depend on no prompts
    with pytest.raises(ValueError, match=r'no column "prompt".*--captions FILE'):
        prompted(*TEXTS).conditions.of(held.rows(torch.tensor([0])))


@pytest.mark.parametrize("name", ["denoising", "dmd2"])
def test_methods_train_on_captioned_latents_and_mind_the_captions(tmp_path, worded, name):
    folder, prompts = worded
    file, histories = tmp_path / "latents.safetensors", []
    for place, captions in enumerate((CAPTIONS, CAPTIONS, CAPTIONS[::-1])):
        teacher = open_generator(folder, prompts=prompts, cache=str(tmp_path / "kept"))
        cache_latents(teacher, source(), file, captions=captions)
        streams = {"train": CachedLatents(source(), str(file)).stream(4)}
        torch.manual_seed(0)
        made = Denoising(teacher, streams) if name == "denoising" else DMD2(teacher, streams=streams, gan=GAN())
        histories.append(losses(made, tmp_path / str(place)))
    one, same, other = histories
    assert one == same
    assert len(one) == 3
    assert one != other, "what an image shows is what it is denoised by"


@pytest.mark.parametrize("method", [Denoising, lambda teacher, streams: DMD2(teacher, streams=streams, gan=GAN())])
@pytest.mark.parametrize("kept", ["images in memory", "images in files", "latents"])
def test_data_without_captions_are_refused_by_the_method_that_reads_them(tmp_path, worded, method, kept):
    folder, prompts = worded
    teacher, data = open_generator(folder, prompts=prompts), source()
    if kept == "images in files":
        for number in range(2):
            (tmp_path / "photos" / "train" / str(number)).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "train" / str(number) / "0.png")
        data = ImageFolder(str(tmp_path / "photos"), 16, val_fraction=0, test_fraction=0)
    if kept == "latents":
        cache_latents(teacher, data, tmp_path / "latents.safetensors")
        data = CachedLatents(data, str(tmp_path / "latents.safetensors"))
    streams = {"train": data.stream(4)}
    with pytest.raises(ValueError, match=r'no column "prompt".*store latents --captions FILE'):
        method(teacher, streams)
    DMD2(teacher, streams=streams)  # it reads none


@pytest.mark.parametrize("method", [Denoising, lambda teacher, streams: DMD2(teacher, streams=streams, gan=GAN())])
def test_captions_of_other_prompts_are_refused_by_the_method_that_reads_them(tmp_path, worded, method):
    folder, prompts = worded
    file, fewer = tmp_path / "latents.safetensors", tmp_path / "fewer.txt"
    cache_latents(open_generator(folder, prompts=prompts), source(), file, captions=CAPTIONS)
    fewer.write_text("a red cat\n")
    other, streams = open_generator(folder, prompts=str(fewer)), {"train": CachedLatents(source(), str(file)).stream(4)}
    with pytest.raises(ValueError, match=r"made with another prompts .*--captions FILE"):
        method(other, streams)
    DMD2(other, streams=streams)  # it reads none
