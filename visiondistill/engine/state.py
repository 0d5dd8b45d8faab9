"""Checkpoints: safetensors and JSON, written atomically, verified when read.

A folder is written under a temporary name, every file's sha256 goes into its manifest, all is
flushed to the disk, and only then does it get its name; old ones lose theirs after that, before
they are deleted. At every moment one complete checkpoint exists, and none that is not has a name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visiondistill.engine.errors import ResumeError

MANIFEST, META = "manifest.json", "meta.json"
UNFINISHED, DISCARDED = ".unfinished", ".discarded"


def save(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
    """Write `{file name: {key: tensor}}` and `meta` to `folder`, whole or not at all.

    Raises:
        OSError: the disk refused; what stood there before is untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for name, group in tensors.items():
            _write({k: t.detach().cpu().contiguous().clone() for k, t in group.items()}, unfinished, name)
        (unfinished / META).write_text(json.dumps(meta, indent=1, sort_keys=True))
        sums = {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())}
        (unfinished / MANIFEST).write_text(json.dumps(sums, indent=1))
        for path in unfinished.iterdir():
            _flush(path)
        _flush(unfinished)
        if folder.exists():
            _discard(folder)
        os.replace(unfinished, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back, after checking every file against the manifest.

    Raises:
        ResumeError: a file is missing, truncated or changed, or is not what its name says.
    """
    files = [folder / name for name in sorted(verify(folder))]
    tensors = {path.stem: _tensors(path) for path in files if path.suffix == ".safetensors"}
    return tensors, json.loads((folder / META).read_text())


def verify(folder: Path) -> list[str]:
    """The names of a whole checkpoint's files.

    Raises:
        ResumeError: names the first file that is not what the manifest says.
    """
    if not (folder / MANIFEST).is_file():
        raise ResumeError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    try:
        sums = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise ResumeError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not isinstance(sums, dict) or META not in sums:
        raise ResumeError(f"{folder / MANIFEST} is damaged: it is not a list of a checkpoint's files")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise ResumeError(f"{path} is missing")
        if sha256_of(path) != expected:
            raise ResumeError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    return list(sums)


def newest(parent: Path) -> Path | None:
    """The newest checkpoint below `parent` that verifies; warns of each newer one that does not.

    Raises:
        ResumeError: there are checkpoints and none of them verifies.
    """
    candidates = sorted(parent.glob("step_*"), reverse=True)
    for folder in candidates:
        try:
            verify(folder)
        except ResumeError as error:
            warnings.warn(f"falling back to an earlier checkpoint: {error}", stacklevel=2)
        else:
            return folder
    if candidates:
        raise ResumeError(f"no checkpoint below {parent} is whole; start anew with resume='none' in another folder")
    return None


def retain(parent: Path, keep: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints, those at multiples of `keep_every`, and what a kill left behind."""
    for folder in sorted(parent.glob("step_*"))[:-keep]:
        if keep_every is None or int(folder.name.removeprefix("step_")) % keep_every:
            _discard(folder)
    for mark in (UNFINISHED, DISCARDED):
        for remains in parent.glob(f".*{mark}"):
            shutil.rmtree(remains)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as `{"index.name": tensor}` and the numbers that are not tensors."""
    tensors, numbers = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
    return tensors, numbers


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
    """Give the optimiser what `pack_optimizer` took; learning rates stay those of the settings."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for path, value in (dict(tensors) | dict(numbers)).items():
        index, _, name = path.partition(".")
        if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape:
            # Files are contiguous; fused optimisers read a moment's memory in the parameter's layout.
            value = torch.empty_like(parameters[int(index)], dtype=value.dtype, device=value.device).copy_(value)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes, to tell whether a rebuilt network is the one of before."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    try:
        save_file(tensors, folder / f"{name}.safetensors")
    except SafetensorError as error:  # its reason is in its text alone
        raise OSError(str(error)) from error


def _discard(folder: Path) -> None:
    # Without its name first: half deleted, it must not pass for a checkpoint.
    nameless = folder.with_name(f".{folder.name}{DISCARDED}")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ResumeError(f"{path} is not a safetensors file: {error}") from error


def sha256_of(path: str | Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
