"""An exported folder as a network again, to measure it or to teach with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.engine.state import sha256_of
from visiondistill.export import program
from visiondistill.export.bundle import FACTS
from visiondistill.models import Network, Timm


class Program(nn.Module):
    """A `torch.export` program as a classifier of pixels in [0, 1]; it is in eval mode for good.

    Attributes:
        num_classes: that it tells apart.
        weights_hash: of the model that it was made from.
    """

    def __init__(self, traced: nn.Module, num_classes: int, weights_hash: str) -> None:
        super().__init__()
        # An exported graph refuses train() and eval(), which reach every submodule.
        traced.train = lambda mode=True: traced
        self.traced, self.num_classes, self.weights_hash = traced, num_classes, weights_hash

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        super()._apply(fn, recurse)
        program.at(self.traced, next(self.traced.parameters()).device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.traced(images)


def open_export(folder: str | Path) -> tuple[Network, dict[str, Any]]:
    """The network in an exported folder, on the CPU in eval mode, and what export.json says of it.

    Raises:
        ValueError: not an export, a file of it is missing or changed, or could run code when it is opened.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise ValueError(f"{folder} is not an export: it has no {FACTS}")
    facts = json.loads((folder / FACTS).read_text("utf-8"))
    for name, expected in facts["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise ValueError(f"{folder / name} is missing or damaged: its sha256 is not the one in {FACTS}")
    pixels = facts["preprocessing"]
    if facts["format"] == "timm":
        with torch.random.fork_rng(devices=[]):  # timm draws weights before it reads them
            return Timm(f"local-dir:{folder}").eval(), facts
    traced = program.read(folder / program.FILE)
    model = Program(traced, len(facts["classes"]), facts["weights"]["sha256"])
    network = Network(model, input_size=tuple(pixels["input_size"]), interpolation=pixels["interpolation"])
    return network.eval(), facts
