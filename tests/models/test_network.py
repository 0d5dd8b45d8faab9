"""The adapter changes pixels as it says and nothing else."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from visiondistill.models import Network, SmallConvNet, SmallMLP, Timm, as_network, evaluating

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


class Pixels(nn.Module):
    """What reaches the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_normalised_by_the_networks_own_statistics(images):
    seen = Network(Pixels(), MEAN, STD)(images).logits
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(seen, (images - mean) / std)
    assert torch.equal(Network(Pixels())(images).logits, images)


def test_images_of_another_size_are_resized_before_normalising(images):
    seen = Network(Pixels(), MEAN, STD, input_size=(3, 5, 6))(images).logits
    resized = interpolate(images, (5, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen, Network(Pixels(), MEAN, STD)(resized).logits)
    assert torch.equal(Network(Pixels(), input_size=(3, 8, 8))(images).logits, images)


def test_bicubic_overshoot_is_cut_off():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1.0
    raw = interpolate(edge, (16, 16), mode="bicubic", antialias=True)
    seen = Network(Pixels(), input_size=(1, 16, 16), interpolation="bicubic")(edge).logits
    assert raw.min() < 0 < 1 < raw.max()
    assert torch.equal(seen, raw.clamp(0, 1))


def test_images_take_the_networks_precision(images):
    network = Network(SmallConvNet(in_channels=3), MEAN, STD).double()
    assert network(images).logits.dtype == torch.float64


def test_the_state_dict_is_the_models_own(images):
    model = SmallConvNet(in_channels=3)
    network = Network(model, MEAN, STD)
    assert {name.removeprefix("model.") for name in network.state_dict()} == set(model.state_dict())


def test_features_are_the_stages_outputs_and_cost_no_logit(images):
    model = SmallConvNet((4, 6, 8), in_channels=3)
    network = Network(model)
    outputs = network(images, stages=(2, 0))
    first = model.stages[0](images)
    torch.testing.assert_close(outputs.features[0], first)
    torch.testing.assert_close(outputs.features[2], model.stages[2](model.stages[1](first)))
    assert set(outputs.features) == {0, 2}
    assert torch.equal(outputs.logits, network(images).logits)
    assert network(images).features == {}


def test_feature_shapes_are_measured_once_without_a_trace():
    network = Network(SmallConvNet((4, 6), "batch", in_channels=3), MEAN, STD, input_size=(3, 8, 10))
    network.model.stages[0].eval()
    modes = [part.training for part in network.modules()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.default_generator.get_state()
    assert network.feature_shapes() == [(4, 8, 10), (6, 4, 5)]
    assert network.feature_shapes((3, 4, 4)) == [(4, 8, 10), (6, 4, 5)]
    assert Network(network.model).feature_shapes((3, 4, 4)) == [(4, 4, 4), (6, 2, 2)]
    assert [part.training for part in network.modules()] == modes
    assert torch.equal(torch.default_generator.get_state(), generator)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_stages_count_from_either_end():
    network = Network(SmallConvNet((4, 6, 8)), input_size=(1, 8, 8))
    assert [network.stage_index(stage) for stage in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for stage in (3, -4):
        with pytest.raises(ValueError, match=f"SmallConvNet has stages 0 to 2, got stage {stage}"):
            network.stage_index(stage)


def test_what_a_model_cannot_give_is_refused(images):
    network = Network(SmallMLP(3 * 64))
    assert network(images).logits.shape == (2, 10)
    for asks in (lambda: network(images, stages=(0,)), network.feature_shapes, lambda: network.stage_index(0)):
        with pytest.raises(TypeError, match="SmallMLP has no features by stage"):
            asks()
    with pytest.raises(ValueError, match=r"give its Network an input_size \(C, H, W\)"):
        Network(SmallConvNet()).feature_shapes()


@pytest.mark.parametrize(
    "statistics", [{"mean": MEAN}, {"std": STD}, {"mean": MEAN, "std": [0.1]}, {"mean": [0.5], "std": [0.0]}]
)
def test_unfit_statistics_are_refused(statistics):
    with pytest.raises(ValueError, match="mean"):
        Network(Pixels(), **statistics)


def test_as_network_wraps_once():
    network = Network(SmallMLP())
    assert as_network(network) is network
    assert as_network(network.model).model is network.model


def test_evaluating_puts_every_mode_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    modes = [part.training for part in model.modules()]
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == modes
    with contextlib.suppress(KeyError), evaluating(model):
        raise KeyError
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("stages", [(), (0, 1)])
def test_one_graph(images, stages):
    torch._dynamo.reset()
    network = Network(SmallConvNet(in_channels=3), MEAN, STD, input_size=(3, 6, 6))
    compiled = torch.compile(lambda x: network(x, stages), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, network(images).logits)


def test_the_mean_of_a_group_normalised_net_does_not_depend_on_the_batch(images):
    network = Network(SmallConvNet(in_channels=3, norm="group"))
    torch.testing.assert_close(network(images).logits[:1], network(images[:1]).logits)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'batch', 'group', 'none'"):
        SmallConvNet(norm="layer")


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet10t", {}, (3, 64, 64)),
        ("test_vit", {"img_size": 32}, (3, 32, 32)),
        ("test_convnext", {}, (3, 48, 48)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, (3, 32, 32)),
        ("crossvit_9_240", {}, (3, 240, 240)),
    ],
)
def test_timm_models_give_features_by_stage(images, name, options, size):
    network = Timm(name, num_classes=7, input_size=size, options=options).eval()
    shapes = network.feature_shapes()
    last = network.stage_index(-1)
    outputs = network(images, stages=(0, last))
    assert outputs.logits.shape == (2, 7)
    assert network.num_classes == 7
    torch.testing.assert_close(outputs.logits, network(images).logits)
    assert [tuple(outputs.features[stage].shape[1:]) for stage in (0, last)] == [shapes[0], shapes[last]]
    with_embedding = network(images, stages=(0,), embedding=True)
    assert with_embedding.embedding.shape == (2, network.embedding_size())
    torch.testing.assert_close(with_embedding.logits, outputs.logits)


def test_timm_models_bring_their_own_pixels(images):
    network = Timm("resnet10t", input_size=(1, 32, 32))
    config = network.model.pretrained_cfg
    x = network.prepare(images[:, :1])
    grey = interpolate(images[:, :1], (32, 32), mode=config["interpolation"], antialias=True).clamp(0, 1)
    mean, std = (sum(config[key]) / 3 for key in ("mean", "std"))
    torch.testing.assert_close(x, (grey - mean) / std)
    assert Timm("resnet10t").input_size == config["input_size"]
