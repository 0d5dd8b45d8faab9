"""Counts against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visiondistill.models import (
    Network,
    SmallConvNet,
    SmallMLP,
    Timm,
    count_flops,
    count_parameters,
    ideal_step_cost,
)


def test_a_multiply_add_counts_as_two():
    assert count_flops(SmallMLP(64, (32,), 10), (1, 8, 8)) == 2 * (64 * 32 + 32 * 10)
    conv = 2 * (8 * 8) * 9 * 3 * 4 + 2 * (4 * 4) * 9 * 4 * 6 + 2 * 6 * 10
    assert count_flops(SmallConvNet((4, 6), in_channels=3), (3, 8, 8)) == conv


def test_attention_is_counted():
    network = Timm("test_vit", input_size=(3, 64, 64), num_classes=10)
    model = network.model
    depth, width, tokens = len(model.blocks), model.embed_dim, (64 // 16) ** 2 + model.num_prefix_tokens
    hidden = model.blocks[0].mlp.fc1.out_features
    projections = 2 * tokens * width * (3 * width + width + 2 * hidden)
    attention = 2 * 2 * tokens * tokens * width
    patches = 2 * (64 // 16) ** 2 * (3 * 16 * 16) * width
    assert count_flops(network) == patches + depth * (projections + attention) + 2 * width * 10


def test_the_size_is_the_networks_own():
    network = Network(SmallConvNet((4,), in_channels=3), input_size=(3, 16, 16))
    at_8 = count_flops(SmallConvNet((4,), in_channels=3), (3, 8, 8)) - 2 * 4 * 10
    assert count_flops(network) - 2 * 4 * 10 == 4 * at_8
    assert count_flops(network, (3, 99, 99)) == count_flops(network)
    with pytest.raises(ValueError, match=r"SmallConvNet depend on the image size: give image_size"):
        count_flops(SmallConvNet())


def test_counting_leaves_no_trace():
    model = SmallConvNet((4,), "batch").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_flops(model, (1, 8, 8))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_are_counted_once():
    layer = nn.Linear(3, 5)
    shared = nn.Sequential(layer, nn.Linear(5, 3), layer)
    assert count_parameters(shared) == 20 + 18
    layer.weight.requires_grad_(False)
    assert count_parameters(shared, trainable=True) == 5 + 18


def test_the_ideal_step_cost():
    assert ideal_step_cost(5, 5) == pytest.approx(4 / 3)
    assert ideal_step_cost(60, 10) == pytest.approx(3)


def test_known_networks():
    assert count_flops(Timm("resnet18")) == pytest.approx(2 * 1.814e9, rel=0.01)
    assert count_flops(Timm("cifar_resnet20a")) == pytest.approx(2 * 40.55e6, rel=0.01)
