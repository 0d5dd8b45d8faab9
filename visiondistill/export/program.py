"""A `torch.export` program: the graph and the weights in one file that torch alone opens."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiondistill.models import Network

FILE, WEIGHTS = "model.pt2", "model.safetensors"
KNOWN = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/\w+_config\.json|models/\w+\.json"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|version|\.data/\w+"
)
"""Records of a program's archive that are read here; others can hold pickles or libraries."""
TOLERANCE = 1e-5
"""Largest difference of logits, over the largest logit: the traced graph may order sums otherwise."""


class Pixels(nn.Module):
    """The classifier as a function of images in [0, 1] of its own size: normalisation is inside."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def sample_images(size: tuple[int, int, int]) -> list[Tensor]:
    """Images `[B, C, H, W]` to compare logits on: two batches of different lengths, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(rows, *size, generator=generator) for rows in (1, 3)]


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


def read(file: Path) -> nn.Module:
    """Open a program, once it is clear that this runs no code: torch unpickles parts of such a file unasked.

    What a program computes is still its maker's choice: open only those whose maker you trust.

    Raises:
        ValueError: not a program, or one that could run code when it is opened.
    """
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        with zipfile.ZipFile(file) as archive, PT2ArchiveReader(str(file)) as reader:
            inside = [name.partition("/")[2] for name in archive.namelist()]
            records = reader.get_file_names()
            # Two readers that see the same names see the same records; torch has both.
            alien = sorted(set(inside) ^ set(records)) or [name for name in records if not KNOWN.fullmatch(name)]
            alien += [name for name in inside if inside.count(name) > 1]
            alien += [name for name in records if name not in alien and not _is_plain(name, reader.read_bytes(name))]
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{file}: not a readable program ({next(iter(str(error).splitlines()), '')})") from error
    if alien:
        raise ValueError(f"{file}: {alien[0]} could run code when it is opened; it was not")
    return torch.export.load(file).module()


def _is_plain(name: str, content: bytes) -> bool:
    """Whether a record holds no pickle, or one of tensors and plain containers."""
    if name.endswith("_config.json"):
        return not any(entry.get("use_pickle", True) for entry in json.loads(content)["config"].values())
    if name.startswith("data/sample_inputs/"):
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # whatever is wrong with it: torch.export would read it with less care
            return False
    return True


def at(traced: nn.Module, device: torch.device) -> None:
    """Make a program compute on the device that its tensors were moved to; its graph names the one of the tracing."""
    for graph in traced.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": device}
                if node.target is torch.ops.aten.to.device:
                    node.args = (node.args[0], device, *node.args[2:])
            graph.recompile()


def difference(network: Network, folder: Path, samples: Sequence[Tensor]) -> float:
    """Open the program again; returns the largest difference of its logits.

    Raises:
        RuntimeError: it is beyond rounding.
    """
    opened = read(folder / FILE)
    worst = 0.0
    for images in samples:
        expected = network(images).logits
        apart = (opened(images) - expected).abs().max().item()
        if not apart <= TOLERANCE * expected.abs().max().item():
            raise RuntimeError(f"the exported program's logits differ from the model's by {apart:.3g}")
        worst = max(worst, apart)
    return worst
