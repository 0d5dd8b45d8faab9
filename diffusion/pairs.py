"""Stored pairs of unit noise and the sample that a teacher makes of it, for DMD's regression.

A store is a folder: `pairs.json` says who made the pairs and how, and names the files that hold them,
`BLOCK` rows each. What it names is whole, and an interrupted store goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffusion.conditions import Conditions
from diffusion.generator import Generator
from visiondistill.data import Stream, TensorData
from visiondistill.engine.rng import key
from visiondistill.engine.state import fingerprint, sha256_of, write_text

MANIFEST = "pairs.json"
BLOCK = 1000

READABLE = 40
"""Characters up to which a message shows what differs: a scale, not a hash."""


def store_pairs(
    generator: Generator, count: int, path: str | Path, seed: int = 0, batch_size: int = 64, steps: int | None = None
) -> Path:
    """Store `count` pairs in the folder `path`; what is there already is kept.

    Pair i is made of the seed and i alone: a store can be extended by a larger count.

    Args:
        generator: the teacher, with a deterministic sampler; its guidance and conditions are used.
        steps: of the sampler; default the generator's own.

    Raises:
        ValueError: count < 1, a random sampler, or a store of another teacher, seed or sampling.
    """
    steps, folder = steps or generator.steps, Path(path)
    if count < 1 or batch_size < 1:
        raise ValueError(f"need count >= 1 and batch_size >= 1, got {count} and {batch_size}")
    if generator.sampler == "student" and steps > 1:
        raise ValueError("pairs need a sampler without noise of its own: one of ddim, euler, heun, or a single step")
    made = {
        **_identity(generator),
        "sampler": generator.sampler,
        "times": _rounded(generator.times(steps)),
        "seed": seed,
    }
    manifest = _read(folder) if (folder / MANIFEST).exists() else {"made": made, "blocks": {}}
    _require_equal(folder, manifest["made"], made)
    folder.mkdir(parents=True, exist_ok=True)
    training = generator.training
    generator.eval()
    try:
        for low in range(0, count, BLOCK):
            _store(generator, range(low, min(low + BLOCK, count)), folder, manifest, seed, batch_size, steps)
    finally:
        generator.train(training)
    return folder


class Pairs:
    """A store's pairs in memory.

    Args:
        path: the store's folder.
        teacher: the generator that must have made them.

    Attributes:
        columns: "noise" and "code" `[N, *shape]`, and the leaves of the conditions.

    Raises:
        ValueError: no store, another teacher's or of another guidance than the teacher's, or a damaged file.
    """

    def __init__(self, path: str | Path, teacher: Generator) -> None:
        folder = Path(path)
        if not (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds no pairs ({MANIFEST} is missing): visiondistill store pairs makes them")
        manifest, identity = _read(folder), _identity(teacher)
        _require_equal(folder, {name: manifest["made"].get(name) for name in identity}, identity)
        blocks = []
        for _, entry in sorted(manifest["blocks"].items()):
            file = folder / entry["file"]
            if not file.is_file() or sha256_of(file) != entry["sha256"]:
                raise ValueError(f"{file} is missing or damaged: delete the folder and store the pairs again")
            blocks.append(load_file(file))
        self.columns = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        # Seen once: asking for a condition copies its number to the device.
        self._spec = tree_flatten(_at(teacher.conditions, range(1), torch.device("cpu"))[0])[1]
        self._contents = hashlib.sha256("".join(e["sha256"] for e in manifest["blocks"].values()).encode()).hexdigest()

    def stream(self, batch_size: int) -> Stream:
        """Of batches with the columns; it moves all pairs to the run's device."""
        return Stream(TensorData(self.columns), batch_size, contents=self._contents)

    def condition(self, batch: Mapping[str, Tensor]) -> Any:
        """That of a batch's pairs, as the networks take it."""
        return tree_unflatten([batch.get(f"condition.{i}") for i in range(self._spec.num_leaves)], self._spec)


def _store(
    generator: Generator,
    rows: range,
    folder: Path,
    manifest: dict[str, Any],
    seed: int,
    batch_size: int,
    steps: int,
) -> None:
    place = f"{rows.start // BLOCK:06d}"
    before = manifest["blocks"].get(place, {"rows": 0})
    if before["rows"] >= len(rows):
        return
    # A longer block has another name: until the manifest tells of it, the shorter one holds.
    name = f"pairs_{place}_{len(rows)}.safetensors"
    unfinished = folder / f".{name}.unfinished"
    save_file(_block(generator, rows, seed, batch_size, steps), unfinished)
    entry = {"file": name, "rows": len(rows), "sha256": sha256_of(unfinished)}
    os.replace(unfinished, folder / name)
    manifest["blocks"][place] = entry
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    if before["rows"]:
        (folder / before["file"]).unlink()


@torch.no_grad()
def _block(generator: Generator, rows: range, seed: int, batch_size: int, steps: int) -> dict[str, Tensor]:
    device = next((held.device for held in chain(generator.parameters(), generator.buffers())), torch.device("cpu"))
    parts: list[dict[str, Tensor]] = []
    for low in range(rows.start, rows.stop, batch_size):
        each = range(low, min(low + batch_size, rows.stop))
        noise = torch.stack([_unit_noise(seed, row, generator.shape) for row in each]).to(_precision(generator))
        condition, null_condition = _at(generator.conditions, each, device)
        codes = generator.sample(noise.to(device), condition, null_condition, steps=steps)
        leaves = {f"condition.{i}": leaf.cpu() for i, leaf in enumerate(tree_flatten(condition)[0]) if leaf is not None}
        parts.append({"noise": noise, "code": codes.cpu(), **leaves})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _at(conditions: Conditions | None, rows: range, device: torch.device) -> tuple[Any, Any]:
    return (None, None) if conditions is None else conditions.at(rows, device)


def _unit_noise(seed: int, row: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key(seed, "pair", row)))


def _precision(generator: Generator) -> torch.dtype:
    """float32, or float64 for networks of that precision."""
    first = next((p.dtype for p in generator.denoiser.parameters()), torch.float32)
    return torch.promote_types(first, torch.float32)


def _identity(generator: Generator) -> dict[str, Any]:
    """Whose pairs they are: weights, path, what goes in and out, and the guidance."""
    denoiser, process = generator.denoiser, generator.process
    t = torch.linspace(process.min_t, process.max_t, 11, dtype=torch.float64)
    return {
        "weights": fingerprint(denoiser.state_dict()),
        "process": type(process).__name__,
        "path": _rounded(torch.cat([process.alpha(t), process.sigma(t)])),
        "prediction_type": denoiser.prediction_type,
        "shape": list(generator.shape),
        "num_classes": generator.num_classes,
        **{name: list(told) if isinstance(told, tuple) else told for name, told in generator.guidance.items()},
    }


def _rounded(values: Tensor) -> list[float]:
    """As far as machines agree on them."""
    return [float(f"{value:.9g}") for value in values.tolist()]


def _require_equal(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [_both(name, found.get(name), wanted[name]) for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise ValueError(
            f"{folder} holds pairs that were made otherwise: {', '.join(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}. Store this teacher's pairs in another folder, or take "
            f"the teacher that made these, with its guidance"
        )


def _both(name: str, found: Any, wanted: Any) -> str:
    readable = len(f"{found}{wanted}") <= READABLE
    return f"{name} ({found} there, {wanted} here)" if readable else name


def _read(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text())
    # Earlier stores do not say it: guidance could not be rescaled.
    manifest["made"].setdefault("guidance_rescale", 0.0)
    return manifest
