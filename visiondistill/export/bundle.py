"""One folder that holds a trained classifier and all that its forward pass depends on.

    timm architectures    config.json, model.safetensors     timm.create_model("local-dir:...", pretrained=True)
    everything else       model.pt2, model.safetensors       torch.export.load, with torch alone
    both                  README.md, export.json, model.onnx where asked for

What was written is opened again and compared before the folder gets its name.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from visiondistill.engine import Result
from visiondistill.engine.loop import Use
from visiondistill.engine.state import sha256_of
from visiondistill.eval.identity import CropMode, preprocessing, weights_hash
from visiondistill.export import onnx_file, program, timm_folder
from visiondistill.export.card import render
from visiondistill.exported import FACTS, About, check_free, written_whole
from visiondistill.models import Network, as_network


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        folder: where.
        format: "timm" or "program".
        files: name to sha256, of every file but README.md and export.json.
        weights: "EMA", "raw" ..., as given.
        weights_sha256: of the tensors, see `eval.weights_hash`.
        largest_difference: of the logits, reopened against exported, for each form that was written.
    """

    folder: Path
    format: Literal["timm", "program"]
    files: dict[str, str]
    weights: str
    weights_sha256: str
    largest_difference: dict[str, float]


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    classes: Sequence[str],
    about: About | None = None,
    weights: str = "as given",
    input_size: tuple[int, int, int] | None = None,
    crop_pct: float = 1.0,
    crop_mode: CropMode = "squash",
    onnx: bool = False,
) -> Exported:
    """Write a classifier so that it opens without this package, and prove that it does.

    The weights are lifted to float32, laid out contiguously and written from the CPU; the model
    itself and all generators stay as they are. With several processes the first one alone calls this.

    Args:
        model: a `Network`, or any classifier of pixels in [0, 1].
        folder: new, empty, or an earlier export, which is replaced.
        classes: names in the order of the labels.
        about: for the model card.
        weights: which weights the model holds: "EMA", "raw".
        input_size: `(C, H, W)` of the run's images, for a network that takes every size.
        crop_pct, crop_mode: of the data source's evaluation: "center" cuts the middle out of the
            image, "squash" leaves it whole for the network to resize.
        onnx: also write model.onnx (needs the packages of the extra "export").

    Raises:
        ValueError: names and classes differ in number, no input size is known, the folder is in use
            by something else, or torch.export cannot trace the model (with its reason).
        RuntimeError: what was written does not answer as the model does.
        ModuleNotFoundError: `onnx` without the packages that it needs.
    """
    about, folder = about or About(), Path(folder)
    check_free(folder)
    network = _portable(model)
    size = tuple(network.input_size or input_size or _nominal_size(network.model))
    network.input_size = size
    pixels = preprocessing(network, size, crop_pct, crop_mode)
    with written_whole(folder) as unfinished:
        # Making a model draws random weights before the written ones replace them.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _check_names(network, size, classes)
            form, differences = _write(network, unfinished, list(classes), about, pixels)
            if onnx:
                differences["onnx"] = onnx_file.write(network, unfinished / onnx_file.FILE, program.sample_images(size))
        files = {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())}
        exported = Exported(folder, form, files, weights, weights_hash(network), differences)
        _describe(exported, unfinished, list(classes), about, pixels)
    return exported


def export_run(
    result: Result,
    folder: str | Path | None = None,
    *,
    use: Use = "auto",
    **options: Any,
) -> Exported:
    """Export what a run made.

    Args:
        result: of `engine.train`.
        folder: by default `export` in the run folder.
        use: the averaged weights, the raw ones, or ("auto") the average where one was kept.
        options: as of `export`: `classes`, `about`, `crop_pct` ...

    Raises:
        ValueError: the average is asked for and none was kept; further errors as `export`.
    """
    product, weights = result.choose(use)
    return export(product, folder or result.output_dir / "export", weights=weights, **options)


def rehearse(model: nn.Module, **options: Any) -> Exported:
    """Try `export` before the training, in a temporary folder; arguments and errors are the same."""
    with TemporaryDirectory() as folder:
        return export(model, Path(folder) / "export", **options)


def _write(
    network: Network, folder: Path, classes: list[str], about: About, pixels: Mapping[str, Any]
) -> tuple[Literal["timm", "program"], dict[str, float]]:
    """Write the model in the form that suits it; returns the form, and the logits' difference by form."""
    samples = program.sample_images(network.input_size)
    if timm_folder.knows(network.model):
        try:
            timm_folder.write(network.model, folder, classes, about.name, about.license, pixels)
            return "timm", {"timm": timm_folder.difference(network, folder, samples)}
        except (RuntimeError, ValueError, TypeError) as error:
            # A layer exchanged by hand is in no configuration; the program holds it nevertheless.
            warnings.warn(
                f"timm could not rebuild this {type(network.model).__name__} ({error}); it is exported as a program",
                stacklevel=3,
            )
            for path in folder.iterdir():
                path.unlink()
    program.write(network, folder, samples)
    return "program", {"program": program.difference(network, folder, samples)}


def _portable(model: nn.Module) -> Network:
    """A copy on the CPU, in float32, in eval mode, its tensors contiguous."""
    network = copy.deepcopy(as_network(model)).cpu().float().eval().requires_grad_(False)
    for tensor in (*network.parameters(), *network.buffers()):
        # Not contiguous(): it lets channels-last strides of 1x1 kernels be, and kernels are chosen by strides.
        tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.data)
    return network


def _nominal_size(model: nn.Module) -> tuple[int, int, int]:
    if not timm_folder.knows(model):
        raise ValueError(
            f"{type(model).__name__} takes images of every size: say which the run used (input_size (C, H, W))"
        )
    from timm.models import get_model_input_config

    return get_model_input_config(model)["input_size"]


def _check_names(network: Network, size: tuple[int, int, int], classes: Sequence[str]) -> None:
    count = network(program.sample_images(size)[0]).logits.shape[1]
    if len(classes) != count or len(set(classes)) != count:
        raise ValueError(f"the classifier tells {count} classes apart, {len(set(classes))} names were given")


def _describe(exported: Exported, folder: Path, classes: list[str], about: About, pixels: Mapping[str, Any]) -> None:
    facts = {
        "format": exported.format,
        "files": exported.files,
        "weights": {"which": exported.weights, "sha256": exported.weights_sha256, "dtype": "float32"},
        "classes": classes,
        "preprocessing": dict(pixels),
        "about": asdict(about),
        "largest_difference": exported.largest_difference,
        "versions": {name: metadata.version(name) for name in ("torch", "timm")},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False, default=str), "utf-8")
    (folder / "README.md").write_text(render(facts), "utf-8")
