"""All layers fine-tuned, each at a lower rate than the one after it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from visiondistill import Distiller, Optim, Run, Stage, recipes, train
from visiondistill.data import EmbeddedDigits, Stream, TensorData
from visiondistill.engine import Result
from visiondistill.engine.players import Player
from visiondistill.eval import evaluate
from visiondistill.models import Timm
from visiondistill.terms import CE

DECAY, LR = 0.75, 0.02


def vit() -> Timm:
    return Timm("vit_tiny_patch16_224", num_classes=3, input_size=(3, 32, 32), options={"depth": 4})


def cnn() -> Timm:
    # By default the last norm of a block starts at 0, and no gradient passes it in the first update.
    return Timm("resnet10t", num_classes=3, input_size=(3, 32, 32), options={"zero_init_last": False})


def vit_layer(name: str) -> int:
    """Layers of the ViT above this parameter's; the head has none."""
    if name.startswith("head."):
        return 0
    block = re.match(r"blocks\.(\d+)", name)
    # The last norm belongs to the last block, embeddings and class token to the stem.
    return 4 - int(block[1]) if block else 1 if name.startswith("norm.") else 5


def cnn_layer(name: str) -> int:
    """Layers of the ResNet above this parameter's, one block a stage."""
    if name.startswith("fc."):
        return 0
    stage = re.match(r"layer(\d)\.0\.", name)
    return 5 - int(stage[1]) if stage else 5


NETWORKS = {"vit": (vit, vit_layer), "cnn": (cnn, cnn_layer)}


def rates(player: Player) -> dict[str, float]:
    place = {id(p): group["lr"] for group in player.optimizer.param_groups for p in group["params"]}
    return {name.removeprefix("model."): place[id(p)] for name, p in player.named.items()}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0), ("constant", 4), ("cosine", 4), ("linear", 0)])
def test_layers_keep_their_ratio_at_every_step(kind: str, schedule: str, warmup: int):
    make, layer = NETWORKS[kind]
    settings = Optim(lr=LR, schedule=schedule, warmup=warmup, options={"layer_decay": DECAY})
    player = Player("student", make(), settings, steps=10, optimizer=None)
    head: list[float] = []
    for step in range(10):
        player.schedule(step)
        found = rates(player)
        head.append(next(rate for name, rate in found.items() if layer(name) == 0))
        assert found == pytest.approx({name: head[-1] * DECAY ** layer(name) for name in found}, rel=1e-12)
    assert {layer(name) for name in found} == set(range(6))
    shape = {
        "constant": lambda t: 1.0,
        "cosine": lambda t: (1 + math.cos(math.pi * (t - warmup) / (10 - warmup))) / 2,
        "linear": lambda t: 1 - t / 10,
    }[schedule]
    expected = [LR * (t / warmup if t < warmup else shape(t)) for t in range(10)]
    assert head == pytest.approx(expected, rel=1e-9), "the head learns at the full rate"


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_update_moves_every_layer_by_its_own_rate(tmp_path: Path, kind: str):
    """The first update of Adam is the rate itself, whatever the gradient."""
    make, layer = NETWORKS[kind]
    torch.manual_seed(0)
    network = make()
    before = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    data = TensorData({"image": torch.rand(8, 3, 32, 32), "label": torch.arange(8) % 3})
    method = Distiller(student=network, terms={"ce": CE()}, streams={"train": Stream(data, 8)})
    run = Run(str(tmp_path / "run"), batch_size=8, device="cpu", log_every=1, progress=False)
    result = train([Stage(method, 1, {"student": Optim(lr=LR, options={"layer_decay": DECAY})})], run)
    step = {name: (tensor.detach() - before[name]).abs().max().item() for name, tensor in network.named_parameters()}
    expected = {name: LR * DECAY ** layer(name.removeprefix("model.")) for name in step}
    assert step == pytest.approx(expected, rel=2e-2)
    assert result.history[0]["lr/student"] == pytest.approx(LR), "what is logged is what the head has"


@pytest.fixture(scope="module")
def half_taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a net that has learnt to tell the digits 0 to 4 apart."""
    folder = tmp_path_factory.mktemp("start")
    digits = EmbeddedDigits().train().columns
    keeps = digits["label"] < 5
    data = TensorData({name: column[keeps] for name, column in digits.items()})
    torch.manual_seed(0)
    network = Timm("cifar_resnet8", num_classes=5, input_size=(1, 8, 8))
    method = Distiller(student=network, terms={"ce": CE()}, streams={"train": Stream(data, 64)})
    run = Run(str(folder / "run"), batch_size=64, device="cpu", progress=False)
    train([Stage(method, 60, {"student": Optim(lr=1e-2, schedule="cosine")})], run)
    torch.save(network.model.state_dict(), folder / "five.pth")
    return folder / "five.pth"


@pytest.fixture(scope="module")
def tuned(half_taught: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Both recipes from the same start, by the same steps."""
    results = {}
    for recipe in ("finetune", "finetune_all"):
        changes = {
            "data": {"class_path": "visiondistill.data.EmbeddedDigits"},
            "student.name": "cifar_resnet8",
            "student.pretrained": False,
            "student.weights": str(half_taught),
            "student.input_size": [1, 8, 8],
            "steps": 60,
            "optim.student.lr": 1e-2,
            "optim.student.warmup": 10,
            "run.output_dir": str(tmp_path_factory.mktemp(recipe) / "run"),
            "run.device": "cpu",
            "run.progress": False,
        }
        results[recipe] = recipes.run(recipes.override(recipes.load(recipe), changes))
    return results


def test_all_layers_learn_more_than_a_head_alone(tuned: dict[str, Result]):
    test = EmbeddedDigits().test()
    head, everything = (evaluate(tuned[recipe].product, test).accuracy for recipe in ("finetune", "finetune_all"))
    assert everything > 0.85
    assert everything > head + 0.05


def test_everything_follows_the_new_data_under_a_new_head(tuned: dict[str, Result], half_taught: Path):
    start = {name: tensor for name, tensor in torch.load(half_taught).items() if not name.startswith("fc.")}
    network = tuned["finetune_all"].product
    assert (network.trainable, network.num_classes, network.model.fc.out_features) == ("all", 10, 10)
    assert any("running_mean" in name for name in start)
    now, frozen = (tuned[recipe].product.model.state_dict() for recipe in ("finetune_all", "finetune"))
    assert not [name for name, tensor in start.items() if torch.equal(tensor, now[name])]
    assert not [name for name, tensor in start.items() if not torch.equal(tensor, frozen[name])]


def test_every_part_trains_in_its_training_mode():
    network = Timm("cifar_resnet8", trainable="all").train()
    assert all(part.training for part in network.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
