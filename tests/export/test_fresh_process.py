"""An export opens in a process that cannot import this package, and answers as the run did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from visiondistill.data import Digits, TensorData
from visiondistill.eval import collect, evaluate
from visiondistill.export import About, export, open_export
from visiondistill.models import Network, SmallConvNet, Timm

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Doubled(nn.Module):
    """A user's own module, with tied weights and a tensor that is made in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0, 1, 64, device=x.device, dtype=x.dtype)
        return self.head(self.second(self.first(x.flatten(1) + ramp).relu()).relu())


def small_timm() -> Network:
    """Of timm, grey, and stored channels-last, as trainings on GPUs leave it."""
    return Timm("test_resnet", num_classes=10, input_size=(1, 8, 8), mean=[0.3], std=[0.4]).to(
        memory_format=torch.channels_last
    )


def cifar() -> Network:
    """Of timm's registry by our doing: a plain timm does not know it."""
    return Timm("cifar_resnet8", num_classes=10, input_size=(1, 8, 8), mean=[0.3], std=[0.4])


def own() -> Network:
    return Network(Doubled(), [0.3], [0.4], (1, 8, 8))


def small() -> Network:
    return Network(SmallConvNet(norm="batch"), [0.3], [0.4], (1, 8, 8))


CASES = {"timm": small_timm, "cifar": cifar, "own": own}


def trained(make) -> Network:
    """A few steps, so that it answers better than chance and BatchNorm has statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, data = make(), Digits("train")
        rows = torch.randperm(len(data)).split(64)[:12]
        optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
        network.train()
        for index in rows:
            batch = data.rows(index)
            optimizer.zero_grad()
            cross_entropy(network(batch["image"]).logits, batch["label"]).backward()
            optimizer.step()
    return network.eval()


def bytes_of_digits() -> TensorData:
    """The test digits as uint8 images, as files have them."""
    columns = Digits("test").columns
    return TensorData({"image": (columns["image"] * 255).round().to(torch.uint8), "label": columns["label"]})


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_answers_as_the_run_did(case, tmp_path):
    network, data = trained(CASES[case]), bytes_of_digits()
    here = evaluate(network, data)
    assert here.accuracy > 0.2
    exported = export(network, tmp_path / "export", classes=NAMES, about=About(metrics={"correct": here.correct}))
    kind = "timm" if case == "timm" else "program"
    assert exported.format == kind

    portable, _ = open_export(exported.folder)
    images = data.rows(torch.arange(5))["image"]
    prepared = (portable.prepare(images) if kind == "timm" else images).contiguous()
    np.savez(
        tmp_path / "images.npz",
        image=data.columns["image"][:, 0].numpy(),
        label=data.columns["label"].numpy(),
        prepared=prepared.numpy(),
    )
    script = Path(__file__).with_name("opened.py")
    command = [sys.executable, "-P", str(script), kind, str(exported.folder), "images.npz", "out.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        assert np.array_equal(found["prepared"], portable(images).logits.numpy())
    assert found["right"] == here.correct
    np.testing.assert_allclose(found["logits"], collect(network, data).logits.numpy(), rtol=1e-4, atol=1e-4)
    assert json.loads((exported.folder / "export.json").read_text())["about"]["metrics"]["correct"] == found["right"]
