"""A new head on old features: the frozen trunk stays, bit for bit, and layers learn at their own rates."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from visiondistill import Distiller, Optim, Run, Stage, train
from visiondistill.data import Stream, TensorData
from visiondistill.engine.optim import build_optimizer
from visiondistill.models import ClassPath, Network, SmallMLP, Timm
from visiondistill.terms import CE


@pytest.fixture
def weights(tmp_path) -> str:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def probe(weights: str, **arguments) -> Timm:
    return Timm(
        "resnet10t",
        weights=weights,
        num_classes=3,
        new_head=True,
        trainable="head",
        input_size=(3, 32, 32),
        **arguments,
    )


def test_only_the_head_trains_and_the_trunk_stays_in_eval_mode(weights):
    network = probe(weights, options={"drop_rate": 0.5})
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["model.fc.weight", "model.fc.bias"]
    for _ in range(2):
        network.train()
        assert {name for name, part in network.named_modules() if part.training} == {"", "model.fc"}
        network.eval()
        assert not any(part.training for part in network.modules())


def test_a_frozen_trunk_keeps_no_graph(weights):
    network = probe(weights).train()
    images = torch.rand(4, 3, 32, 32)
    outputs = network(images, stages=(1,))
    assert not outputs.features[1].requires_grad
    (loss := outputs.logits.square().sum()).backward()
    assert loss.requires_grad
    assert [n for n, p in network.named_parameters() if p.grad is not None] == ["model.fc.weight", "model.fc.bias"]


@pytest.mark.parametrize("trainable", ["head", "all"])
def test_a_run_moves_what_trains_and_nothing_else(weights, tmp_path, trainable):
    torch.manual_seed(0)
    network = probe(weights)
    if trainable == "all":
        network = Timm("resnet10t", weights=weights, num_classes=3, new_head=True, input_size=(3, 32, 32))
    before = copy.deepcopy(network.state_dict())
    data = TensorData({"image": torch.rand(16, 3, 32, 32), "label": torch.arange(16) % 3})
    method = Distiller(student=network, terms={"ce": CE()}, streams={"train": Stream(data, batch_size=8)})
    run = Run(output_dir=str(tmp_path / "run"), batch_size=8, device="cpu", ema_decay=0.5, progress=False)
    train([Stage(method, steps=3, optim={"student": Optim(lr=1e-2)})], run)
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    if trainable == "head":
        assert moved == {"model.fc.weight", "model.fc.bias"}
    else:
        assert moved == set(before)


def test_models_without_a_head_to_find_are_refused():
    with pytest.raises(TypeError, match=r"trainable 'head': SmallMLP needs the method get_classifier\(\)"):
        ClassPath("visiondistill.models.SmallMLP", trainable="head")
    with pytest.raises(TypeError, match=r"SmallMLP needs the method reset_classifier"):
        ClassPath("visiondistill.models.SmallMLP", num_classes=3, new_head=True)
    with pytest.raises(ValueError, match="trainable must be 'all' or 'head', got 'neck'"):
        Timm("resnet10t", trainable="neck")


def rates(module: nn.Module, **options) -> dict[str, tuple[float, float]]:
    """Learning-rate factor and weight decay of each parameter."""
    optimizer = build_optimizer(module, Optim(weight_decay=0.1, options=options), "student")
    place = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name.removeprefix("model."): (place[id(p)].get("lr_scale", 1.0), place[id(p)]["weight_decay"])
        for name, p in module.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("name", ["test_vit", "resnet10t", "test_convnext", "cifar_resnet8"])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}])
def test_rates_and_decay_are_those_of_the_model_itself(name, options):
    network = Timm(name)
    ours = rates(network, **options)
    assert ours == rates(network.model, **options)
    if options:
        factors = [factor for factor, _ in ours.values()]
        assert min(factors) < 0.5 < max(factors) == 1.0


def test_what_a_model_wants_without_decay_has_none():
    assert rates(Timm("test_vit"))["pos_embed"][1] == 0.0


def test_a_model_that_says_nothing_has_one_rate():
    network = Network(SmallMLP())
    assert network.no_weight_decay() == set()
    assert {factor for factor, _ in rates(network, layer_decay=0.5).values()} == {1.0}


def test_a_frozen_trunk_takes_layer_decay_too(weights):
    assert set(rates(probe(weights), layer_decay=0.5)) == {"fc.weight", "fc.bias"}


def test_a_new_head_forgets_the_names_of_the_old_classes(tmp_path):
    labelled = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(labelled, str(tmp_path), model_config={"label_names": ["cat", "dog"]})
    network = Timm(f"local-dir:{tmp_path}", num_classes=3, new_head=True)
    assert "label_names" not in network.model.pretrained_cfg
    assert Timm(f"local-dir:{tmp_path}").model.pretrained_cfg["label_names"] == ["cat", "dog"]
