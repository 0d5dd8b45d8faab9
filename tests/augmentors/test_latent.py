"""Edits in an autoencoder's latents: how far they go, what learns from whom, which folders are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autoencoders import toy_vae
from distilling import apart, weights
from torch import Tensor

from visiondistill import Distiller
from visiondistill.augmentors import Hard, LatentEdit
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Draw, Optim, Run, Stage, train
from visiondistill.engine.errors import SettingsError
from visiondistill.models import SmallConvNet
from visiondistill.terms import KL


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_vae(tmp_path_factory.mktemp("vae"))


def pictures(count: int = 4, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def noise_for(edit: LatentEdit, image: Tensor, seed: int = 0) -> Tensor:
    return edit.noise(image, Draw(seed, 0, {"": (0, len(image))}, 1, image.device), "test")


def unsettled(edit: LatentEdit, size: float) -> LatentEdit:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        edit.net[-1].weight.normal_(std=size)
    return edit


def answer(edit: LatentEdit, image: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    return edit(edit.encode(image), noise_for(edit, image, seed), image.flip(0))


def test_at_first_an_image_is_what_the_autoencoder_makes_of_it(vae: str) -> None:
    from diffusers import AutoencoderKL

    image = pictures()
    theirs = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(image * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        edited, share = answer(LatentEdit(vae), image)
    torch.testing.assert_close(edited, expected.clamp(0, 1))
    assert torch.equal(share, torch.ones(4))


@torch.no_grad()
def test_the_residual_is_bounded_by_the_images_own_latents(vae: str) -> None:
    image, seen = pictures() * torch.tensor([0.1, 0.4, 0.7, 1.0]).view(4, 1, 1, 1), []
    edit = unsettled(LatentEdit(vae, bound=0.2), 100.0)
    decode, edit.frozen["vae"].decode = edit.frozen["vae"].decode, lambda z: seen.append(z) or decode(z)
    edited, _ = answer(edit, image)
    code = edit.encode(image)
    norms = (seen[0] - code).flatten(1).norm(dim=1) / code.flatten(1).norm(dim=1)
    assert (norms <= 0.2 * (1 + 1e-5)).all()
    assert (norms > 0.15).all(), "the net's answers are far beyond where tanh ends"
    assert 0 <= edited.min() < edited.max() <= 1


@torch.no_grad()
def test_an_answer_depends_on_the_image_and_on_the_noise(vae: str) -> None:
    edit, image = unsettled(LatentEdit(vae), 1.0), pictures()
    code, noise = edit.encode(image), noise_for(edit, image)
    numbers = edit.numbers(code, noise, image)
    assert code.shape == numbers.shape == (4, 2, 2, 3)
    assert (numbers - edit.numbers(code, noise_for(edit, image, 1), image)).abs().max() > 1e-2
    assert (numbers - edit.numbers(code.flip(0), noise, image)).abs().max() > 1e-2
    torch.testing.assert_close(edit.numbers(7 * code, noise, image), numbers)


def test_the_gradient_reaches_the_net_through_the_decoder_only(vae: str) -> None:
    edit, image = unsettled(LatentEdit(vae), 0.5), pictures().requires_grad_()
    assert not edit.encode(image).requires_grad
    edited, _ = answer(edit, image)
    edited.square().mean().backward()
    assert image.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in edit.parameters())
    assert all(parameter.grad is None for parameter in edit.frozen["vae"].parameters())


def test_the_autoencoder_is_neither_trained_nor_saved(vae: str, tmp_path: Path) -> None:
    def made() -> Distiller:
        torch.manual_seed(0)
        data = TensorData({"image": pictures(8, 8, 8), "label": torch.arange(8) % 3})
        augmentor = Hard(LatentEdit(vae, width=4), stability=0.1, diversity=0.1, upper=None)
        nets = [SmallConvNet((width,), in_channels=3, num_classes=3) for width in (6, 4)]
        return Distiller(
            nets[0], student=nets[1], terms={"kd": KL()}, augmentor=augmentor, streams={"train": Stream(data, 4)}
        )

    def play(method: Distiller, folder: str, **settings) -> None:
        run = {"output_dir": str(tmp_path / folder), "batch_size": 4, "progress": False, "device": "cpu"}
        train([Stage(method, 4, {"default": Optim(lr=1e-2)})], Run(**run | {"proof_window": 2} | settings))

    whole, again = made(), made()
    networks = {"edit": whole.players["augmentor"], "vae": whole.frozen["augmentor_vae"]}
    before = {name: weights(network) for name, network in networks.items()}
    asked, encode = [], networks["vae"].encode
    networks["vae"].encode = lambda image: asked.append(len(image)) or encode(image)
    play(whole, "whole", checkpoint_every=2, keep=9)
    assert asked == [2] * 4, "once a step, for the edited half of the batch"
    assert apart(before["vae"], weights(networks["vae"])) == 0
    assert apart(before["edit"], weights(networks["edit"])) > 0
    assert not any("vae" in name for name in networks["edit"].state_dict())
    play(again, "again", resume=str(tmp_path / "whole" / "checkpoints" / "step_000000002"))
    assert apart(weights(whole), weights(again)) == 0


def test_its_search_is_one_graph(vae: str) -> None:
    edit, image = unsettled(LatentEdit(vae), 0.5), pictures()
    code, noise = edit.encode(image), noise_for(edit, image)
    compiled = torch.compile(edit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(code, noise, image)[0], edit(code, noise, image)[0])


def test_images_that_do_not_fit_are_refused_with_the_cure(vae: str) -> None:
    edit = LatentEdit(vae)
    for refused in (edit.encode, lambda image: noise_for(edit, image)):
        with pytest.raises(SettingsError, match=r"4 x 4 pixels, and the images are 8 x 10: choose .* multiples of 4"):
            refused(pictures(2, 8, 10))
        with pytest.raises(SettingsError, match="takes 3 channels, the images have 1"):
            refused(pictures()[:, :1])


def test_folders_that_hold_no_whole_autoencoder_are_refused(vae: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json is missing: name the folder of a diffusers AutoencoderKL"):
        LatentEdit(str(tmp_path))
    folder = Path(toy_vae(tmp_path / "broken"))
    (folder / "config.json").write_text("no json")
    with pytest.raises(ValueError, match="is no config"):
        LatentEdit(str(folder))
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds 'UNet2DModel': only a diffusers AutoencoderKL"):
        LatentEdit(str(folder))
    folder = Path(toy_vae(tmp_path / "pickled"))
    (weights_file,) = folder.glob("*.safetensors")
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    weights_file.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded.*diffusion_pytorch_model.safetensors"):
        LatentEdit(str(folder))
    folder = Path(toy_vae(tmp_path / "shallow"))
    deeper = Path(toy_vae(tmp_path / "deeper", layers_per_block=2))
    (folder / "config.json").write_text((deeper / "config.json").read_text())
    with pytest.raises(ValueError, match="missing tensors, such as"):
        LatentEdit(str(folder))
    with pytest.raises(ValueError, match="need bound > 0, got 0"):
        LatentEdit(vae, bound=0)


def test_without_diffusers_it_names_the_extra(vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SettingsError, match=r"pip install 'visiondistill\[diffusion\]'"):
        LatentEdit(vae)


def test_importing_it_imports_no_diffusers() -> None:
    code = "import sys; from visiondistill.augmentors import LatentEdit; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
