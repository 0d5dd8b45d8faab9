"""What an export says is the run's, what it does not know is refused, and nothing else is touched."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from visiondistill import Distiller
from visiondistill.data import Digits, Stream
from visiondistill.engine import Optim, Run, Stage, train
from visiondistill.eval import evaluate, weights_hash
from visiondistill.export import About, export, export_run, open_export, rehearse
from visiondistill.models import Network, SmallConvNet, Timm
from visiondistill.terms import CE

NAMES = [f"digit {number}" for number in range(10)]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A timm model whose configuration is full of what its source's weights were."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=10)
    model.pretrained_cfg |= {
        "license": "cc-by-nc-4.0",
        "test_input_size": (3, 224, 224),
        "test_crop_pct": 1.0,
        "label_names": [str(number) for number in range(10)],
        "paper_ids": "arXiv:0000.00000",
    }
    return model


def run(folder, student, **settings):
    method = Distiller(student=student, terms={"ce": CE()}, streams={"train": Stream(Digits("train"), 32)})
    given = {"output_dir": str(folder), "batch_size": 32, "progress": False, "device": "cpu", "log_every": 1}
    return train([Stage(method, 4, {"default": Optim(lr=1e-2)})], Run(**given | settings))


def test_the_configuration_is_the_runs_not_the_sources(source, tmp_path):
    before = dict(source.pretrained_cfg)
    network = Network(source, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], (3, 48, 48), "bilinear")
    export(
        network,
        tmp_path / "export",
        classes=NAMES,
        about=About(name="mine", license="mit"),
        crop_pct=0.9,
        crop_mode="center",
    )
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    own = config["pretrained_cfg"]
    assert config["label_names"] == NAMES
    assert (config["num_classes"], own["num_classes"]) == (10, 10)
    assert own["input_size"] == [3, 48, 48]
    assert (own["mean"], own["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert (own["interpolation"], own["crop_pct"], own["crop_mode"]) == ("bilinear", 0.9, "center")
    assert (own["tag"], own["license"]) == ("mine", "mit")
    assert not {"test_input_size", "test_crop_pct", "paper_ids", "hf_hub_id", "url", "origin_url"} & set(own)
    assert source.pretrained_cfg == before
    export(network, tmp_path / "unsaid", classes=NAMES)
    assert "license" not in json.loads((tmp_path / "unsaid" / "config.json").read_text())["pretrained_cfg"]


def test_timms_transform_prepares_images_as_the_run_did(source, tmp_path):
    import timm

    network = Network(source, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], (3, 48, 48), "bilinear").eval()
    export(network, tmp_path / "export", classes=NAMES)
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 12, generator=generator)
    pixels = (torch.nn.functional.interpolate(coarse, (90, 120), mode="bicubic").clamp(0, 1) * 255).byte()
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    ours, theirs = network.prepare(pixels / 255)[0], transform(picture)
    # PIL rounds to whole grey levels after each pass: 1/255 in the normalised scale is at most 1/255/0.5.
    assert (ours - theirs).abs().max() < 2 / 255 / 0.5


def test_vision_transformers_keep_their_own_image_size(tmp_path):
    import timm

    network = Timm("test_vit", num_classes=10, input_size=(3, 32, 32))
    assert export(network, tmp_path / "export", classes=NAMES).format == "timm"
    opened = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert opened.patch_embed.img_size == (32, 32)
    assert timm.data.resolve_data_config(model=opened)["input_size"] == (3, 32, 32)


def test_a_layer_exchanged_by_hand_makes_a_program_and_is_said(source, tmp_path):
    import copy

    model = copy.deepcopy(source)
    model.fc = nn.Sequential(nn.Linear(model.num_features, 16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.warns(UserWarning, match="timm could not rebuild this ResNet"):
        exported = export(Network(model, input_size=(3, 32, 32)), tmp_path / "export", classes=NAMES)
    assert exported.format == "program"
    assert not (exported.folder / "config.json").exists()


def test_a_program_takes_any_number_of_images(tmp_path):
    network = Network(SmallConvNet(norm="batch"), [0.3], [0.4], (1, 8, 8)).eval()
    export(network, tmp_path / "export", classes=NAMES)
    program = torch.export.load(tmp_path / "export" / "model.pt2").module()
    for rows in (1, 2, 7, 64):
        images = torch.rand(rows, 1, 8, 8)
        assert torch.equal(program(images), network(images).logits)


def of_timm() -> Network:
    return Timm("test_resnet", num_classes=10, input_size=(1, 16, 16))


def of_ours() -> Network:
    return Network(SmallConvNet(norm="batch"), [0.3], [0.4], (1, 16, 16), "bicubic")


@pytest.mark.parametrize("make", [of_timm, of_ours])
def test_what_is_opened_again_has_the_scores_and_the_hash_of_the_run(make, tmp_path):
    network, data = make(), Digits("val")
    exported = export(network, tmp_path / "export", classes=NAMES)
    state = torch.get_rng_state()
    opened, facts = open_export(exported.folder)
    assert torch.equal(state, torch.get_rng_state())
    ours, theirs = evaluate(network, data), evaluate(opened, data)
    assert (ours.correct, ours.count) == (theirs.correct, theirs.count)
    assert ours.nll == pytest.approx(theirs.nll, rel=1e-5)
    assert weights_hash(opened) == weights_hash(network) == exported.weights_sha256 == facts["weights"]["sha256"]
    assert opened.num_classes == 10
    opened.train()
    opened.eval()


def test_an_opened_program_computes_where_it_is_moved(tmp_path):
    """Its graph asserts the device that it was traced on, which on another one ends in an error."""
    opened, _ = open_export(export(of_ours(), tmp_path / "export", classes=NAMES).folder)
    images = torch.rand(3, 1, 16, 16)
    shape = opened(images).logits.shape
    assert opened.to("meta")(images.to("meta")).logits.shape == shape
    named = [node.kwargs["device"].type for node in opened.model.traced.graph.nodes if "device" in node.kwargs]
    assert set(named) == {"meta"}


def test_the_average_is_exported_where_one_was_kept(tmp_path):
    result = run(tmp_path / "run", Network(SmallConvNet(), [0.3], [0.4], (1, 8, 8)), ema_decay=0.5)
    assert weights_hash(result.ema) != weights_hash(result.product)
    averaged = export_run(result, classes=NAMES)
    assert averaged.folder == tmp_path / "run" / "export"
    assert (averaged.weights, averaged.weights_sha256) == ("EMA", weights_hash(result.ema))
    raw = export_run(result, tmp_path / "raw", use="raw", classes=NAMES)
    assert (raw.weights, raw.weights_sha256) == ("raw", weights_hash(result.product))
    assert "Weights: EMA" in (averaged.folder / "README.md").read_text()
    assert "Weights: raw" in (raw.folder / "README.md").read_text()
    stored = load_file(raw.folder / "model.safetensors")
    SmallConvNet().load_state_dict(stored, strict=True)
    assert all(torch.equal(tensor, result.product.model.state_dict()[name]) for name, tensor in stored.items())


def test_a_run_without_an_average_exports_raw_weights_or_refuses(tmp_path):
    result = run(tmp_path / "run", Network(SmallConvNet(), [0.3], [0.4], (1, 8, 8)))
    assert export_run(result, classes=NAMES).weights == "raw"
    with pytest.raises(ValueError, match="kept no average"):
        export_run(result, tmp_path / "ema", use="ema", classes=NAMES)


def test_the_model_and_the_generators_stay_as_they_were(tmp_path):
    network = Timm("test_resnet", num_classes=10, input_size=(3, 32, 32)).double()
    network.to(memory_format=torch.channels_last).train()
    state, before = torch.get_rng_state(), weights_hash(network)
    strides = [parameter.stride() for parameter in network.parameters()]
    export(network, tmp_path / "export", classes=NAMES)
    assert torch.equal(state, torch.get_rng_state())
    assert weights_hash(network) == before
    assert [parameter.stride() for parameter in network.parameters()] == strides
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.int64}


def test_the_rehearsal_leaves_nothing_and_has_the_same_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert rehearse(Network(SmallConvNet(), input_size=(1, 8, 8)), classes=NAMES).format == "program"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="tells 10 classes apart, 3 names were given"):
        rehearse(Network(SmallConvNet(), input_size=(1, 8, 8)), classes=list("abc"))
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10] * (2 if x.sum() > 0 else 1)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    folder = tmp_path / "export"
    with pytest.raises(ValueError, match=r"torch\.export cannot trace Branching"):
        export(Network(Branching(), input_size=(1, 8, 8)), folder, classes=NAMES)
    with pytest.raises(ValueError, match="SmallConvNet takes images of every size"):
        export(SmallConvNet(), folder, classes=NAMES)
    with pytest.raises(ValueError, match="9 names were given"):
        export(Network(SmallConvNet(), input_size=(1, 8, 8)), folder, classes=[*NAMES[:9], NAMES[0]])
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(tmp_path):
    network = Network(SmallConvNet(), input_size=(1, 8, 8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier export"):
        export(network, tmp_path / "mine", classes=NAMES)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    first = export(network, tmp_path / "export", classes=NAMES)
    (first.folder / "leftover.bin").write_bytes(b"")
    export(network, first.folder, classes=NAMES)
    assert not (first.folder / "leftover.bin").exists()


def test_a_damaged_export_is_refused_by_file(tmp_path):
    exported = export(Network(SmallConvNet(), input_size=(1, 8, 8)), tmp_path / "export", classes=NAMES)
    shutil.copytree(exported.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt2 is missing or damaged"):
        open_export(tmp_path / "copy")
    (exported.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
        open_export(exported.folder)
    with pytest.raises(ValueError, match="not an export"):
        open_export(tmp_path)


def test_the_model_card_says_what_a_stranger_needs(source, tmp_path):
    about = About(
        name="tiny digits",
        data={"source": "Digits", "splits": {"test": 500}},
        teacher="SmallConvNet (64, 128), 99 % on test",
        method="KD, temperature 4",
        metrics={"n": 500, "accuracy": 0.912345678, "weights": {"which": "EMA"}},
        license="mit",
    )
    export(
        Network(source, [0.5] * 3, [0.25] * 3, (3, 32, 32)), tmp_path / "a", classes=NAMES, about=about, weights="EMA"
    )
    card = (tmp_path / "a" / "README.md").read_text()
    for text in (
        "pretrained=True",
        "random weights",
        "license: mit",
        "tiny digits",
        "Digits",
        "SmallConvNet (64, 128)",
        "KD, temperature 4",
        "| n | 500 |",
        "| accuracy | 0.912346 |",
        "7 digit 7",
        "[B, 3, 32, 32]",
        "[0.25, 0.25, 0.25]",
        "EMA",
    ):
        assert text in card
    export(Network(SmallConvNet(), input_size=(1, 8, 8)), tmp_path / "b", classes=NAMES)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "torch.export.load" in card
    assert "not normalised" in card
    assert "{" not in card.split("## Training")[0].replace("{mode}", "{")


def test_a_network_of_its_own_size_keeps_it_whatever_the_size_of_the_images(tmp_path):
    network = Timm("test_resnet", num_classes=10, input_size=(3, 48, 48)).eval()
    export(network, tmp_path / "export", classes=NAMES, input_size=(3, 20, 20))
    opened, facts = open_export(tmp_path / "export")
    assert facts["preprocessing"]["input_size"] == [3, 48, 48]
    images = torch.rand(4, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(opened(images).logits, network(images).logits)
