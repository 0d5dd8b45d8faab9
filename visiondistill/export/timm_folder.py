"""timm's own folder: `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.models import Network

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OF_THE_SOURCE = ("origin_url", "paper_name", "paper_ids", "notes", "description", "license", "label_offset")
"""Entries that describe the weights a model started from, not those it has."""


def knows(model: nn.Module) -> bool:
    """Whether a plain timm, without this or any other package, has the architecture and the class."""
    config = getattr(model, "pretrained_cfg", None)
    if not config or not type(model).__module__.startswith("timm."):
        return False
    from timm.models import is_model, model_entrypoint

    architecture = config.get("architecture")
    return bool(
        architecture and is_model(architecture) and model_entrypoint(architecture).__module__.startswith("timm.")
    )


def write(
    model: nn.Module, folder: Path, classes: Sequence[str], tag: str, license: str | None, pixels: Mapping[str, Any]
) -> None:
    """Write config.json and model.safetensors.

    What timm would copy from the weights that the model started from (size, tag, licence, names of
    the classes, papers) is replaced by the run's own, or left out.

    Args:
        model: of timm, on the CPU, its tensors contiguous.
        pixels: as of `eval.preprocessing`.

    Raises:
        ValueError: the model was built with arguments that no JSON file can hold, or is made for
            another image size than the run's.
    """
    from timm.models import save_for_hf

    size = tuple(pixels["input_size"])
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(classes), "pretrained_cfg": {"tag": tag}},
        safe_serialization=True,
        data_config={
            "input_size": size,
            **{key: pixels[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        },
    )
    path = folder / CONFIG
    config = json.loads(path.read_text("utf-8"))
    own = config["pretrained_cfg"]
    for key in OF_THE_SOURCE:
        own.pop(key, None)
    if license is not None:
        own["license"] = license
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def difference(network: Network, folder: Path, samples: Sequence[Tensor]) -> float:
    """Open the folder again and compare logits on the same normalised images, which must be equal to the bit.

    Raises:
        RuntimeError: they are not.
    """
    import timm

    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for images in samples:
        prepared = network.prepare(images)
        if not torch.equal(opened(prepared), network.model(prepared)):
            raise RuntimeError("the model that timm rebuilt from its configuration gives other logits")
    return 0.0
