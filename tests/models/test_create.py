"""A network from a name is the one that was asked for, or refused with the cure."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visiondistill.engine.state import sha256_of
from visiondistill.models import ClassPath, SmallConvNet, Timm, require_classes

NAME = "resnet10t"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path):
    """Weights of five classes, in half precision, as DDP names them."""
    torch.manual_seed(0)
    tensors = timm.create_model(NAME, num_classes=5).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({f"module.{n}": t.half() if t.is_floating_point() else t for n, t in tensors.items()}, path)
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the hub and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


def cached(hub, repository: str, tensors) -> str:
    """Put a model into a cache of the hub, as its client does."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(tensors, snapshot / "model.safetensors")
    return str(snapshot / "model.safetensors")


def test_a_timm_model_brings_its_own_pixels():
    network = Timm(NAME, num_classes=7)
    config = timm.create_model(NAME).pretrained_cfg
    assert network.num_classes == 7
    assert network.input_size == config["input_size"]
    assert network.interpolation == config["interpolation"]
    assert network.crop_pct == config["crop_pct"]
    torch.testing.assert_close(1 / network.scale.flatten(), torch.tensor(config["std"]))
    torch.testing.assert_close(-network.shift / network.scale, torch.tensor(config["mean"])[:, None, None])
    assert (network.source.kind, network.source.sha256) == ("random", None)


def test_its_pixels_can_be_overridden(images):
    network = Timm(NAME, input_size=(3, 32, 48), mean=[0.5] * 3, std=[0.25] * 3, interpolation="bilinear")
    assert (network.input_size, network.interpolation) == ((3, 32, 48), "bilinear")
    torch.testing.assert_close(network.prepare(images[..., :32, :48]), (images[..., :32, :48] - 0.5) / 0.25)


@pytest.mark.parametrize("arguments", [{"input_size": (1, 64, 64)}, {"options": {"in_chans": 1}}])
def test_grey_images_take_the_mean_of_the_statistics(images, arguments):
    network = Timm(NAME, **arguments).eval()
    assert network.input_size[0] == 1
    assert network.scale.shape == (1, 1, 1)
    assert network(images[:, :1]).logits.shape == (2, 1000)


@pytest.mark.parametrize("arguments", [{"input_size": (3, 64, 64)}, {"options": {"img_size": 64}}])
def test_a_model_made_for_one_size_is_made_for_the_one_asked(images, arguments):
    network = Timm("test_vit", **arguments).eval()
    assert network.input_size == (3, 64, 64)
    assert network(images).logits.shape == (2, 1000)


def test_options_reach_the_model_and_wrong_ones_are_named():
    assert Timm(NAME, options={"drop_rate": 0.25}).model.drop_rate == 0.25
    with pytest.raises(TypeError, match=r"resnet10t with options \['drop_rat'\]"):
        Timm(NAME, options={"drop_rat": 0.25})
    with pytest.raises(ValueError, match=r"options must not hold \['num_classes'\]"):
        Timm(NAME, options={"num_classes": 3})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet81", r"no model 'resnet81' \(did you mean .*'resnet18'"),
        ("cifar_resnet2", r"\(did you mean .*'cifar_resnet20'"),
        ("resnet18.a1_in2k", "resnet18 has no weights 'a1_in2k'; there are .*resnet18.a1_in1k"),
        ("timm/resnet18", "a model of the hub is hf-hub:timm/resnet18, a folder local-dir:timm/resnet18"),
        ("local-dir:/nowhere", "no config.json in this folder"),
    ],
)
def test_unknown_names_get_the_nearest(name, told):
    with pytest.raises(ValueError, match=told):
        Timm(name)


def test_weights_from_a_file_are_loaded_whole_with_their_classes(file, images):
    network = Timm(NAME, weights=str(file)).eval()
    stored = load_file(file)
    assert network.num_classes == 5
    assert all(torch.equal(t, stored[f"module.{n}"].to(t.dtype)) for n, t in network.model.state_dict().items())
    assert network.source.sha256 == sha256_of(file)
    assert network.source.notes == ("stripped the prefix 'module.'", "lifted float16 to float32")
    assert str(file) in str(network.source)
    assert network.num_classes == Timm(NAME, weights=str(file), num_classes=5).num_classes


def test_a_head_is_new_only_where_it_is_asked_for(file):
    with pytest.raises(ValueError, match="5 classes apart, 8 were asked for") as refused:
        Timm(NAME, weights=str(file), num_classes=8)
    command = f"visiondistill train --recipe finetune --student.name {NAME} --student.pretrained false"
    assert f"{command} --student.weights {file} --data.root DIR" in str(refused.value)
    network = Timm(NAME, weights=str(file), num_classes=8, new_head=True)
    stored = load_file(file)
    assert network.num_classes == 8
    assert torch.equal(network.model.conv1[0].weight, stored["module.conv1.0.weight"].float())
    with pytest.raises(ValueError, match="give num_classes"):
        Timm(NAME, weights=str(file), new_head=True)
    with pytest.raises(ValueError, match="without them every layer is new"):
        Timm(NAME, num_classes=8, new_head=True)


def test_a_trunk_without_head_needs_a_new_one(tmp_path):
    trunk = timm.create_model(NAME, num_classes=0).state_dict()
    save_file(trunk, tmp_path / "trunk.safetensors")
    with pytest.raises(ValueError, match=r"2 missing in the file: 'fc.bias', 'fc.weight'"):
        Timm(NAME, weights=str(tmp_path))
    network = Timm(NAME, weights=str(tmp_path), num_classes=4, new_head=True)
    assert network.model.fc.weight.shape[0] == 4
    assert torch.equal(network.model.conv1[0].weight, trunk["conv1.0.weight"])


def test_weights_of_another_architecture_are_refused(file):
    with pytest.raises(ValueError, match=r"do not fit ResNet .* missing in the file"):
        Timm("resnet26t", weights=str(file))
    with pytest.raises(ValueError, match="pretrained and weights exclude each other"):
        Timm(NAME, pretrained=True, weights=str(file))


def test_pretrained_weights_without_a_network_fail_with_the_file_and_the_cure(offline):
    with pytest.raises(ValueError, match=r"hf-hub:timm/resnet18\.a1_in1k/model\.safetensors") as refused:
        Timm("resnet18", pretrained=True)
    assert "give it as weights: FILE (with name: resnet18)" in str(refused.value)
    with pytest.raises(ValueError, match=r"hf-hub:timm/resnet18.a1_in1k/config.json cannot be had"):
        Timm("hf-hub:timm/resnet18.a1_in1k")
    with pytest.raises(ValueError, match="cifar_resnet20 has no published weights"):
        Timm("cifar_resnet20", pretrained=True)


def test_a_hub_that_does_not_answer_is_not_waited_for(offline, monkeypatch):
    from huggingface_hub import constants

    asked = []

    def answer(url, **options):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *a, **k: pytest.fail("timm's client was asked"))
    for name in ("resnet18", "hf-hub:timm/resnet18.a1_in1k"):
        with pytest.raises(ValueError, match=r"cannot be had .Name or service not known."):
            Timm(name, pretrained=True)
    assert [url.rpartition("/")[2] for url in asked] == ["model.safetensors", "config.json"]


def test_pretrained_weights_are_read_from_the_cache_and_hashed(offline, images):
    torch.manual_seed(0)
    donor = timm.create_model(NAME).eval()
    file = cached(offline, "timm/resnet10t.c3_in1k", donor.state_dict())
    network = Timm(NAME, pretrained=True, input_size=(3, 64, 64)).eval()
    assert torch.equal(network(images).logits, donor(network.prepare(images)))
    assert (network.source.kind, network.source.file) == ("pretrained", file)
    assert network.source.sha256 == sha256_of(file)
    with pytest.raises(ValueError, match=r"1000 classes apart, 7 were asked for.*\n.*--student.name resnet10t --data"):
        Timm(NAME, pretrained=True, num_classes=7)
    fresh = Timm(NAME, pretrained=True, num_classes=7, new_head=True)
    assert (fresh.num_classes, fresh.model.fc.weight.shape[0]) == (7, 7)
    assert torch.equal(fresh.model.conv1[0].weight, donor.conv1[0].weight)


def test_a_folder_that_timm_exported_opens_with_its_weights(tmp_path, images):
    torch.manual_seed(0)
    donor = timm.create_model(NAME, num_classes=3).eval()
    timm.models.save_for_hf(donor, tmp_path, safe_serialization=True)
    network = Timm(f"local-dir:{tmp_path}", input_size=(3, 64, 64)).eval()
    assert network.num_classes == 3
    assert torch.equal(network(images).logits, donor(network.prepare(images)))
    assert network.source.sha256 == sha256_of(tmp_path / "model.safetensors")
    torch.save(donor.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"several weight files, name one of model.safetensors, pytorch_model.bin"):
        Timm(f"local-dir:{tmp_path}")
    architecture = Timm(f"local-dir:{tmp_path}", pretrained=False)
    assert architecture.source.kind == "random"
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == NAME


def test_a_class_path_is_called_with_its_arguments(images):
    path = "visiondistill.models.SmallConvNet"
    network = ClassPath(path, {"widths": [4, 8], "in_channels": 3}, num_classes=6, mean=[0.5] * 3, std=[0.5] * 3)
    assert isinstance(network.model, SmallConvNet)
    assert network.num_classes == 6
    assert network(images, stages=(1,)).features[1].shape == (2, 8, 32, 32)
    torch.testing.assert_close(network.prepare(images), images * 2 - 1)
    assert ClassPath(path, {"num_classes": 3, "in_channels": 3}, num_classes=6).num_classes == 3


def test_a_function_of_another_library_serves_too(tmp_path, images):
    path = "torchvision.models.resnet18"
    donor = ClassPath(path, {"num_classes": 4}).eval()
    torch.save({"state_dict": donor.model.state_dict()}, tmp_path / "w.pth")
    network = ClassPath(path, weights=str(tmp_path / "w.pth"), num_classes=4).eval()
    assert torch.equal(network(images).logits, donor(images).logits)
    assert network.num_classes == 4
    assert network.source.notes == ("took the entry 'state_dict'",)
    with pytest.raises(ValueError, match=r"fc.weight \[4, 512\] for \[5, 512\]"):
        ClassPath(path, weights=str(tmp_path / "w.pth"), num_classes=5)


@pytest.mark.parametrize(
    ("path", "arguments", "error", "told"),
    [
        ("nopackage.Net", {}, ValueError, "'nopackage.Net' cannot be imported: No module named 'nopackage'"),
        ("Net", {}, ValueError, "'Net'"),
        ("torchvision.models.resnet81", {}, ValueError, r"has no 'resnet81' \(did you mean 'resnet18'\?\)"),
        ("visiondistill.models.SmallConvNet", {"width": 3}, TypeError, r"with \['width'\]: .*'width'"),
        ("builtins.dict", {}, TypeError, "gives a dict, not a torch.nn.Module"),
    ],
)
def test_class_paths_that_lead_nowhere_are_refused(path, arguments, error, told):
    with pytest.raises(error, match=told):
        ClassPath(path, arguments)


def test_a_teacher_of_other_classes_is_refused_with_the_command_that_makes_one(file):
    network = Timm(NAME, weights=str(file))
    require_classes(network, 5)
    with pytest.raises(ValueError, match="teacher resnet10t tells 5 classes apart, but /photos has 3") as refused:
        require_classes(network, 3, "/photos")
    assert str(refused.value).endswith(network.finetune_command)
    with pytest.raises(ValueError, match=r"SmallConvNet tells 10 .*\n  visiondistill train --recipe finetune"):
        require_classes(SmallConvNet(), 3)
    require_classes(nn.Linear(2, 2), 3)


@pytest.mark.parametrize(
    ("name", "file", "arguments"),
    [
        ("torchvision.models.squeezenet1_1", "squeezenet1_1/squeezenet1_1_imagenet_fp16.pth", None),
        ("tf_efficientnet_lite0", "efficientnet_lite/tf_efficientnet_lite0.in1k_fp16.safetensors", {}),
    ],
)
def test_real_half_precision_files_open(shared_dir, images, name, file, arguments):
    path = shared_dir / "data" / "weights" / file
    if not path.is_file():
        pytest.skip(f"no {path}")
    network = ClassPath(name, weights=str(path)) if arguments is None else Timm(name, weights=str(path))
    assert network.num_classes == 1000
    assert "lifted float16 to float32" in network.source.notes
    assert network.eval()(images).logits.std() > 0.1
