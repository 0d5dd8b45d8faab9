"""Extractors: what they refuse, what their features depend on, and weights of other people."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.eval import (
    Extractor,
    InceptionExtractor,
    RandomExtractor,
    Reference,
    Statistics,
    classifier_features,
    collect,
    extractor_of,
    extractors,
    frechet_distance,
    squeezenet,
    timm_features,
)
from diffusion.eval.extractors import quantised
from visiondistill.export import export
from visiondistill.models import ClassPath, Timm


def images(count: int = 6, size: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_pixels_are_rounded_to_8_bits():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0])
    assert quantised(values).tolist() == [0, 0, 1, 255, 255]
    assert quantised(torch.arange(256) / 255).tolist() == list(range(256)), "8-bit images come back as they were"
    extractor, x = RandomExtractor(), images()
    assert torch.equal(extractor.features(x), extractor.features(quantised(x)))


def test_random_features_depend_on_the_seed_alone():
    state, x = torch.get_rng_state(), images()
    first, same, other = RandomExtractor(), RandomExtractor(0), RandomExtractor(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.identity == same.identity != other.identity
    assert torch.equal(first.features(x), same.features(x))
    assert not torch.equal(first.features(x), other.features(x))
    assert first.features(x).shape == (6, 32 + 64 + 128)


def test_features_do_not_depend_on_the_batch():
    extractor, x = RandomExtractor(), images(9)
    parts = torch.cat([extractor.features(part) for part in x.split(2)])
    torch.testing.assert_close(parts, extractor.features(x), rtol=1e-5, atol=1e-6)


def test_grey_images_are_repeated():
    extractor, grey = RandomExtractor(), images(channels=1)
    assert torch.equal(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="3 channels, got 2"):
        extractor.features(images(channels=2))


def test_extractors_stay_in_eval_mode_and_give_no_gradients():
    extractor = extractor_from_timm()
    extractor.train()
    extractor.features(images())
    assert not any(part.training for part in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not extractor.features(images()).requires_grad


def extractor_from_timm(seed: int = 0) -> Extractor:
    torch.manual_seed(seed)
    network = Timm("resnet18", input_size=(3, 16, 16))
    return extractors.NetworkExtractor("resnet18", network, extractors._embedding, "pooled features")


def test_features_of_a_network_are_its_embedding():
    extractor, x = extractor_from_timm(), images(size=16)
    features = extractor.features(x)
    network = extractor.network.eval()
    assert torch.equal(features, network(quantised(x).float() / 255, embedding=True).embedding)
    assert extractor.preprocessing["input_size"] == [3, 16, 16]
    assert extractor.preprocessing["layer"] == "pooled features"


@pytest.mark.parametrize("content", [None, b"not the published weights"])
def test_fid_is_refused_without_the_published_file(tmp_path: Path, content: bytes | None):
    """Its name cannot stand in for its bytes."""
    file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    if content is not None:
        file.write_bytes(content)
    for make in (InceptionExtractor, lambda weights: extractor_of("inception", weights)):
        with pytest.raises(ValueError, match=r"no file|sha256") as refused:
            make(file)
        assert "torch-fidelity's releases" in str(refused.value)
        assert "another extractor" in str(refused.value)
    with pytest.raises(ValueError, match=r"name it as the weights \(--extractor_weights FILE\)"):
        extractor_of("inception")


def test_the_published_file_is_known_by_the_whole_of_its_sha256():
    assert extractors.INCEPTION_SHA256.startswith("6726825d")
    assert len(extractors.INCEPTION_SHA256) == 64


def test_fid_names_the_extra_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extractors, "_require_inception", lambda file: None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"visiondistill\[eval\]"):
        InceptionExtractor(tmp_path / "file")


@pytest.mark.slow
def test_fid_features_are_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With its architecture and random weights: 8-bit images in, its own resizing, 2048 features out."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    made = library.FeatureExtractorInceptionV3("any", ["2048"])
    monkeypatch.undo()
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(extractors, "_require_inception", lambda file: None)
    extractor, x = InceptionExtractor(tmp_path / "weights.pth"), images(2, channels=1)
    features = extractor.features(x)
    assert features.shape == (2, 2048)
    assert torch.equal(features, made((x * 255).round().to(torch.uint8).repeat(1, 3, 1, 1))[0])


def test_a_trained_classifier_is_opened_from_its_run(tmp_path: Path):
    torch.manual_seed(0)
    network = Timm("resnet18", num_classes=4, input_size=(1, 16, 16))
    export(network, tmp_path / "run" / "export", classes="abcd")
    extractor, x = classifier_features(tmp_path / "run"), images(channels=1, size=16)
    expected = network.eval()(quantised(x).float() / 255, embedding=True).embedding
    torch.testing.assert_close(extractor.features(x), expected.detach(), rtol=1e-4, atol=1e-4)
    assert extractor.name == f"classifier-{extractor.identity[:8]}"
    assert extractor_of(str(tmp_path / "run" / "export")).identity == extractor.identity
    with pytest.raises(ValueError, match="1 channels, got 3"):
        extractor.features(images(size=16))


def test_a_program_gives_its_logits(tmp_path: Path):
    network = ClassPath("test_extractors.Flat", input_size=(1, 4, 4))
    export(network, tmp_path, classes="abc")
    extractor, x = classifier_features(tmp_path), images(size=4, channels=1)
    assert extractor.preprocessing["layer"] == "logits"
    torch.testing.assert_close(extractor.features(x), network(quantised(x).float() / 255).logits.detach())


class Flat(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("name", "weights", "named"),
    [
        ("squeezenets", None, "choose squeezenet"),
        ("random", "file", "takes no weights"),
        ("squeezenet", "/nowhere.pth", "/nowhere.pth"),
        ("timm:resnet1", None, "resnet1"),
        ("timm:resnet18", "/nowhere.pth", "/nowhere.pth"),
        (".", None, "config.json"),
    ],
)
def test_wrong_extractors_are_refused(
    name: str, weights: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        extractor_of(name, weights)


def test_published_weights_that_cannot_be_had_have_a_cure(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.SqueezeNet1_1_Weights.get_state_dict", refuse)
    with pytest.raises(ValueError, match=r"name a file of them \(--extractor_weights FILE.*--extractor random"):
        squeezenet()


@pytest.mark.slow
def test_squeezenet_scores_real_images_as_the_files_notes_say(shared_dir: Path):
    """CIFAR-10, 2,500 against 2,500 clean images."""
    from visiondistill.data import Parquet

    extractor = squeezenet(shared_dir / "data" / "weights" / "squeezenet1_1")
    data = Reference.of(Parquet(str(shared_dir / "data" / "cifar10")), "test")
    features = collect(islice(data.batches(), 20), [extractor]).sets[0].features
    halves = [Statistics.of(half) for half in features[:5000].split(2500)]
    assert frechet_distance(*halves) == pytest.approx(518, rel=0.01)


def test_a_timm_model_is_read_from_a_file(tmp_path: Path):
    network = Timm("test_resnet").eval()
    torch.save(network.model.state_dict(), tmp_path / "weights.pth")
    state, x = torch.get_rng_state(), images(2)
    extractor = timm_features("test_resnet", tmp_path / "weights.pth")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(extractor.features(x), network(quantised(x).float() / 255, embedding=True).embedding)
    other = extractor_of("timm:test_resnet", tmp_path / "weights.pth")
    assert other.facts == extractor.facts


def test_a_timm_model_of_its_file(shared_dir: Path):
    file = shared_dir / "data" / "weights" / "efficientnet_lite" / "tf_efficientnet_lite0.in1k_fp16.safetensors"
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    extractor = timm_features("tf_efficientnet_lite0", file)
    assert extractor.features(images(2, channels=1, size=28)).shape == (2, 1280)
    assert extractor.name == "tf_efficientnet_lite0"
