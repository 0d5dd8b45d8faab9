"""Small distillations for tests: networks, images, a method, one prepared batch, a short run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from visiondistill import Distiller
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Draw, Optim, Run, Stage, train
from visiondistill.engine.rng import key
from visiondistill.models import Network, SmallConvNet
from visiondistill.terms import Term

CLASSES = 3
MIXED = 2
"""A step whose batch `Mix` makes of images of different classes."""


def net(*widths: int, seed: int = 0, norm: str = "group") -> Network:
    """Weights by formula, so that golden numbers hang on no generator."""
    network = Network(SmallConvNet(widths, norm, num_classes=CLASSES), [0.5], [0.25], input_size=(1, 8, 8)).double()
    with torch.no_grad():
        for place, weight in enumerate(network.parameters()):
            phase = torch.arange(weight.numel(), dtype=torch.float64) * 0.7 + place + seed
            weight.copy_(phase.sin().view(weight.shape) / math.sqrt(weight[0].numel()) + (weight.ndim == 1))
    return network


def images(labelled: int = 12) -> TensorData:
    """12 images whose mean brightness is their class; `labelled` of them with their label."""
    label = torch.arange(12) % CLASSES
    wave = torch.arange(12 * 64, dtype=torch.float64).mul(1.3).sin().view(12, 1, 8, 8)
    image = (0.2 * wave + label.view(-1, 1, 1, 1) + 0.5) / CLASSES
    return TensorData({"image": image.clamp(0, 1), "label": label.where(torch.arange(12) < labelled, -1)})


def distiller(terms: dict[str, Term], batch_size: int = 4, labelled: int = 12, **parts) -> Distiller:
    given = {"teacher": net(6, 9, seed=5), "student": net(4, 5)} | parts
    return Distiller(**given, terms=terms, streams={"train": Stream(images(labelled), batch_size)}).double()


def prepared(method: Distiller, step: int = 0) -> dict:
    stream = method.streams["train"]
    batch = {"train": next(stream.open(step, [(0, stream.batch_size)], key(0, "train")))[0]}
    rows = (0, stream.batch_size)
    draw = Draw(0, step, {"": rows, "train": rows}, 1, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        return method.prepare(batch, draw, frozenset({"student"}))


def play(method: Distiller, folder: Path, steps: int = 6, lr: float = 1e-2, **settings):
    run = Run(
        **{"output_dir": str(folder), "batch_size": 4, "log_every": 1, "progress": False, "device": "cpu"} | settings
    )
    return train([Stage(method, steps, {"default": Optim(lr=lr)})], run)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
