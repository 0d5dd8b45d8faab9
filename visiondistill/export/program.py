"""A `torch.export` program: the graph and the weights in one file that torch alone opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiondistill.models import Network

FILE, WEIGHTS = "model.pt2", "model.safetensors"
TOLERANCE = 1e-5
"""Largest difference of logits, over the largest logit: the traced graph may order sums otherwise."""


class Pixels(nn.Module):
    """The classifier as a function of images in [0, 1] of its own size: normalisation is inside."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def write(network: Network, folder: Path, samples: Sequence[Tensor]) -> None:
    """Write model.pt2, for batches of any length, and model.safetensors, under the model's own names.

    Raises:
        ValueError: torch.export cannot trace the model.
    """
    try:
        traced = torch.export.export(
            Pixels(network).eval(), (samples[-1],), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    except Exception as error:  # torch.export has no common class of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"torch.export cannot trace {type(network.model).__name__} for batches of any length: {reason}. "
            f"Its forward pass must be tensor operations alone, without branches on values"
        ) from error
    torch.export.save(traced, folder / FILE)
    # Tied tensors are written once for each name, so that the file loads strictly.
    tensors = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def difference(network: Network, folder: Path, samples: Sequence[Tensor]) -> float:
    """Open the program again; returns the largest difference of its logits.

    Raises:
        RuntimeError: it is beyond rounding.
    """
    opened = torch.export.load(folder / FILE).module()
    worst = 0.0
    for images in samples:
        expected = network(images).logits
        apart = (opened(images) - expected).abs().max().item()
        if not apart <= TOLERANCE * expected.abs().max().item():
            raise RuntimeError(f"the exported program's logits differ from the model's by {apart:.3g}")
        worst = max(worst, apart)
    return worst
