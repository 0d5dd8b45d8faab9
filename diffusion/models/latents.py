"""Images that were encoded once, on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from diffusion.generator import Generator
from visiondistill.data import Source, TensorData, in_order
from visiondistill.engine.state import fingerprint

MANIFEST = ".json"


def cache_latents(
    generator: Generator, source: Source, path: str | Path, *, split: str = "train", batch_size: int = 32
) -> TensorData:
    """Encode a split once by a generator's codec and keep the codes with their labels.

    Writes `path` (safetensors with "code" `[N, *shape]` and "label" `[N]`) and beside it a manifest
    `path` + ".json" that says of which images and by which codec.

    Args:
        generator: whose codec encodes, where it lies.
        source: of the images, at the size of the generator's.
        path: a safetensors file.
        split: of the source.
        batch_size: images that are encoded at a time.

    Raises:
        ValueError: images of another size than the generator's.
    """
    from safetensors.torch import save_file

    if source.input_size is not None and tuple(source.input_size) != tuple(generator.input_size):
        raise ValueError(f"images are {tuple(source.input_size)}, the codec's are {tuple(generator.input_size)}")
    path = Path(path)
    made_of = identity(generator, source, split)
    device = next((held.device for held in generator.codec.parameters()), torch.device("cpu"))
    with torch.no_grad():
        codes = [
            generator.codec.encode(batch["image"].to(device)).cpu()
            for batch in in_order(source.split(split).data, batch_size)
        ]
    columns = {"code": torch.cat(codes), "label": source.split(split).label.cpu()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file({name: held.contiguous() for name, held in columns.items()}, unfinished)
    with unfinished.open("rb") as file:
        sums = hashlib.file_digest(file, "sha256").hexdigest()
    # The manifest last: without it the file is not opened.
    unfinished.replace(path)
    Path(f"{path}{MANIFEST}").write_text(json.dumps(made_of | {"sha256": sums}, indent=1), "utf-8")
    return TensorData(columns)


def open_latents(path: str | Path, generator: Generator, source: Source, *, split: str = "train") -> TensorData:
    """What `cache_latents` wrote, if it was made by this codec of these images.

    Raises:
        ValueError: a file or manifest that is missing or damaged, another codec, or other images.
    """
    from safetensors.torch import load_file

    path, manifest = Path(path), Path(f"{path}{MANIFEST}")
    for file in (path, manifest):
        if not file.is_file():
            raise ValueError(f"{file} is missing: cache the latents again")
    stored = json.loads(manifest.read_text("utf-8"))
    for name, value in identity(generator, source, split).items():
        if stored.get(name) != value:
            raise ValueError(
                f"{path} was made with another {name} ({stored.get(name)}, now {value}): cache the latents again"
            )
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != stored["sha256"]:
            raise ValueError(f"{path} is damaged: its sha256 is not the one in {manifest}. Cache the latents again")
    return TensorData(load_file(path))


def identity(generator: Generator, source: Source, split: str) -> dict[str, Any]:
    """What codes depend on: the images and labels, the codec's weights and settings, the shape of a code."""
    codec, held = generator.codec, source.split(split)
    # Sources of files know their files' digests; of tensors in memory the tensors themselves are asked.
    pixels = fingerprint(held.data.columns) if held.digest is None and isinstance(held.data, TensorData) else ""
    return {
        "data": hashlib.sha256(f"{source.stream(1, split=split).contents}{pixels}".encode()).hexdigest(),
        "split": split,
        "codec": hashlib.sha256(f"{codec!r}{fingerprint(codec.state_dict())}".encode()).hexdigest(),
        "shape": list(generator.shape),
    }
