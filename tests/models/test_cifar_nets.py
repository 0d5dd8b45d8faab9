"""The CIFAR nets are the literature's: by their counts, their structure, and published weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from visiondistill.models import Timm, register_with_timm
from visiondistill.models.cifar import CifarResNet, CifarResNetA, CifarShuffleNetV2, CifarVGG, CifarWideResNet, names
from visiondistill.models.cifar.shufflenet import _UnitV2
from visiondistill.models.cifar.staged import shuffle_channels

AT_100_CLASSES = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8_bn": 3_965_028,
    "vgg13_bn": 9_462_180,
    "mobilenetv2_half": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
AT_10_CLASSES = {"resnet20a": 269_722, "resnet32a": 464_154, "resnet44a": 658_586, "resnet56a": 853_018}
ONE_OF_EACH = [
    "resnet8",
    "resnet8x4",
    "resnet20a",
    "wrn_16_2",
    "vgg8_bn",
    "mobilenetv2_half",
    "shufflenetv1",
    "shufflenetv2",
]
PUBLISHED = {"20": 91.73, "32": 92.63, "44": 93.10, "56": 93.39}


def make(name: str, **options) -> nn.Module:
    import timm

    register_with_timm()
    return timm.create_model(f"cifar_{name}", **options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "count"), (AT_100_CLASSES | AT_10_CLASSES).items())
def test_parameters_are_the_published_number(name, count):
    model = make(name)
    assert model.num_classes == (100 if name in AT_100_CLASSES else 10)
    assert sum(p.numel() for p in model.parameters()) == count


def test_timm_lists_them_with_their_own_pixels():
    import timm

    register_with_timm()
    register_with_timm()
    assert {f"cifar_{name}" for name in AT_100_CLASSES | AT_10_CLASSES} <= set(timm.list_models("cifar_*"))
    assert set(timm.list_models("cifar_*")) == set(names())
    config = make("resnet20").pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.5071, 0.4867, 0.4408)
    assert make("resnet20a").pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_they_have_what_timm_models_have(images, name):
    model = make(name, num_classes=7).eval()
    final, maps = model.forward_intermediates(images)
    assert [(m.shape[1], 32 // m.shape[2]) for m in maps] == [
        (info["num_chs"], info["reduction"]) for info in model.feature_info
    ]
    logits = model(images)
    assert logits.shape == (4, 7)
    assert torch.equal(model.forward_head(final), logits)
    assert torch.equal(model.forward_features(images), final)
    assert model.forward_head(final, pre_logits=True).shape == (4, model.num_features)
    some = model.forward_intermediates(images, indices=[0, -1], intermediates_only=True)
    assert torch.equal(some[0], maps[0])
    assert torch.equal(some[1], maps[-1])
    assert torch.equal(model.forward_intermediates(images, indices=2)[1][0], maps[-2])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_new_classifier_leaves_the_trunk(images, name):
    model = make(name).eval()
    features = model.forward_features(images)
    before = model.get_classifier()
    model.reset_classifier(5)
    assert model.get_classifier() is not before
    assert (model.num_classes, model(images).shape) == (5, (4, 5))
    assert torch.equal(model.forward_features(images), features)
    assert f"{type(model).classifier_name}.weight" in model.state_dict()
    model.reset_classifier(0)
    assert model(images).shape == (4, model.num_features)
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(5, "max")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_parameter_learns(images, name):
    model = make(name)
    final, maps = model.forward_intermediates(images)
    (model.forward_head(final).square().sum() + sum(m.square().mean() for m in maps)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "model", [CifarResNetA(8), CifarVGG((1,) * 5), CifarShuffleNetV2()], ids=lambda m: type(m).__name__
)
def test_stages_trace_as_one_graph(images, model):
    torch._dynamo.reset()
    compiled = torch.compile(model.eval().forward_intermediates, fullgraph=True, backend="eager")
    for ours, plain in zip(compiled(images)[1], model.forward_intermediates(images)[1], strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", ["resnet8x4", "vgg8_bn"])
def test_convolutions_are_drawn_as_he_et_al_say(name):
    torch.manual_seed(0)
    for module in make(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1e5:
            fan_out = module.weight.shape[0] * 9
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_depths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(18)
    with pytest.raises(ValueError, match="6n \\+ 4"):
        CifarWideResNet(20, 1)


def test_an_option_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros(images):
    block = CifarResNetA(8).layer2[0]
    nn.init.zeros_(block.bn2.weight)  # the residual branch adds nothing
    x = images[:, :1].expand(4, 16, 32, 32).abs()
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
    assert not any("downsample" in key for key in CifarResNetA(8).state_dict())


def test_a_wide_block_projects_its_activated_input_and_passes_its_raw_one(images):
    stage = CifarWideResNet(16, 2).eval().block1.layer
    x = images[:, :1].expand(4, 16, 32, 32)
    for block in stage:
        nn.init.zeros_(block.conv2.weight)
    projected = stage[0](x)
    torch.testing.assert_close(projected, stage[0].convShortcut(torch.relu(stage[0].bn1(x))))
    assert torch.equal(stage[1](projected), projected)


def test_a_shuffle_interleaves_the_groups():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert shuffle_channels(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_half_of_the_channels_pass_a_v2_unit(images):
    x = images[:, :1] * torch.arange(1.0, 9.0).view(1, 8, 1, 1)
    assert torch.equal(_UnitV2(8)(x)[:, ::2], x[:, :4])


@pytest.fixture(scope="session")
def cifar10(shared_dir) -> Path:
    pytest.importorskip("pyarrow", reason="reading the CIFAR-10 parquet needs pyarrow")
    folder = shared_dir / "data"
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 at {folder}")
    return folder


def correct(folder: Path, depth: str, count: int) -> int:
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(folder / "cifar10" / "test-00000-of-00001.parquet").slice(0, count).to_pylist()
    pixels = [np.array(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    label = torch.tensor([row["label"] for row in rows])
    (file,) = (folder / "weights" / "cifar10_resnet").glob(f"resnet{depth}-*.th")
    network = Timm(f"cifar_resnet{depth}a", weights=str(file)).eval()
    right = 0
    with torch.no_grad():
        for start in range(0, count, 200):
            batch = torch.from_numpy(np.stack(pixels[start : start + 200])).permute(0, 3, 1, 2) / 255
            right += (network(batch).logits.argmax(1) == label[start : start + 200]).sum().item()
    return right


def test_published_weights_answer_as_published(cifar10):
    # 600 images: the standard error of 91.73 % is 1.1 points; a net with other shortcuts or pixels is far below.
    assert correct(cifar10, "20", 600) / 600 == pytest.approx(PUBLISHED["20"] / 100, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("depth", PUBLISHED)
def test_published_weights_reach_the_published_accuracy(cifar10, depth):
    assert correct(cifar10, depth, 10_000) / 100 == pytest.approx(PUBLISHED[depth], abs=0.1)
