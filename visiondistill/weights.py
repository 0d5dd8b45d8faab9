"""Weights from a file into a model: strictly, without running a pickle's code, with notes of what was done.

Formats: safetensors, and what `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.engine.errors import some
from visiondistill.engine.state import sha256_of

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel and DDP, torch.compile, and training wrappers put before a model's own names."""
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class WeightsSource:
    """Where a network's weights come from.

    Attributes:
        kind: "random", "file" (weights given by the user) or "pretrained" (timm's own).
        file: what was read; None for random weights, and where timm does not say.
        sha256: of that file, in hexadecimal.
        notes: what was done on the way, such as "took the entry 'state_dict'".
    """

    kind: str = "random"
    file: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [self.kind, self.file or "", f"sha256 {self.sha256}" if self.sha256 else "", *self.notes]
        return "; ".join(filter(None, told))


def read_weights(path: str | Path, entry: str | None = None) -> tuple[dict[str, Tensor], WeightsSource]:
    """The state dict in a file, or in the only weight file of a folder.

    Args:
        path: the file or folder.
        entry: which state dict of a file that holds several, such as "model_ema".

    Returns:
        The tensors on the CPU as they are stored, and where they come from.

    Raises:
        ValueError: no file or several, a file that is damaged or would run code, no state dict in it or several.
    """
    file = weight_file(path)
    content = _load(file)
    name, tensors = _state_dict(content, entry, file)
    notes = (f"took the entry '{name}'",) if name else ()
    return tensors, WeightsSource("file", str(file), sha256_of(file), notes)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: WeightsSource) -> WeightsSource:
    """Put a state dict into a model: the two must have the same tensors.

    While the model knows none of the names, known prefixes that all of them share are stripped;
    half-precision tensors take the model's precision; BatchNorm's counters of batches may be missing.

    Returns:
        `source` with the notes of what was done.

    Raises:
        ValueError: tensors missing, unknown or of another shape or kind; the model is left as it was.
    """
    own = model.state_dict()
    tensors, prefix = _unprefixed(tensors, set(own))
    # Files older than PyTorch 0.4.1 lack this counter; it decides nothing while BatchNorm has a momentum.
    counters = {name for name in own if name.endswith(COUNTER) and name not in tensors}
    tensors |= {name: own[name] for name in counters}
    _check(own, tensors, source.file, type(model).__name__)
    notes = [f"stripped the prefix '{prefix}'"] if prefix else []
    notes += [f"kept {len(counters)} counters {COUNTER} that the file lacks"] if counters else []
    lifted = sorted({_short(t.dtype) for name, t in tensors.items() if _is_lifted(t, own[name])})
    notes += [f"lifted {kind} to {_short(_precision(own))}" for kind in lifted]
    model.load_state_dict(tensors)
    return WeightsSource(source.kind, source.file, source.sha256, (*source.notes, *notes))


def weight_file(path: str | Path) -> Path:
    """The file itself, or the only weight file of a folder.

    Raises:
        ValueError: no such path, or not exactly one weight file in the folder.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"weights {path}: no such file or folder")
    found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"weights {path}: no weight file in this folder (looked for {', '.join(SUFFIXES)})")
    raise ValueError(f"weights {path}: several weight files, name one of {', '.join(file.name for file in found)}")


def find_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of that name, or of that name behind the known prefixes, if there is one."""
    return next((tensor for stored, tensor in tensors.items() if name in (stored, _bare(stored))), None)


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"weights {file}: not a readable safetensors file ({error})") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"weights {file}: this pickle holds more than tensors and plain containers, and could run code when "
            f"it is opened; it was not. Where you trust it, save its state dict as safetensors and name that file "
            f"({first})"
        ) from error
    except (RuntimeError, EOFError, ValueError, struct.error, AttributeError, LookupError) as error:
        raise ValueError(f"weights {file}: not a readable PyTorch file ({error})") from error


def _state_dict(content: Any, entry: str | None, file: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of the entry that holds it ("" for the file itself), and the state dict."""
    if not isinstance(content, Mapping):
        raise ValueError(f"weights {file}: holds a {type(content).__name__}, not a state dict")
    if entry is None and _holds_tensors(content):
        return "", dict(content)
    candidates = [name for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)]
    if entry is None and len(candidates) == 1:
        return candidates[0], dict(content[candidates[0]])
    if entry in candidates:
        return entry, dict(content[entry])
    if not candidates:
        raise ValueError(f"weights {file}: no state dict among its entries {some(map(str, content))}")
    if entry is None:
        raise ValueError(f"weights {file}: several state dicts, {', '.join(candidates)}: choose one by weights_entry")
    raise ValueError(f"weights {file}: no state dict {entry!r}; there are {', '.join(candidates)}")


def _holds_tensors(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _unprefixed(tensors: Mapping[str, Tensor], own: set[str]) -> tuple[dict[str, Tensor], str]:
    stripped, prefix = dict(tensors), ""
    while not own & set(stripped):
        shared = next((p for p in PREFIXES if all(name.startswith(p) for name in stripped)), None)
        if shared is None:
            return dict(tensors), ""
        stripped = {name.removeprefix(shared): tensor for name, tensor in stripped.items()}
        prefix += shared
    return stripped, prefix


def _bare(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: str | None, model: str) -> None:
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shared = [name for name in own if name in tensors]
    misshapen = [
        f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
        for name in shared
        if tensors[name].shape != own[name].shape
    ]
    miscast = [
        f"{name} {_short(tensors[name].dtype)} for {_short(own[name].dtype)}"
        for name in shared
        if tensors[name].is_floating_point() != own[name].is_floating_point()
    ]
    complaints = {
        "missing in the file": missing,
        "unknown to the model": extra,
        "of another shape": misshapen,
        "of another kind": miscast,
    }
    if any(complaints.values()):
        told = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in complaints.items() if names)
        raise ValueError(f"weights {file} do not fit {model} ({len(own)} tensors): {told}. Nothing was loaded")


def _is_lifted(tensor: Tensor, into: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < into.dtype.itemsize


def _precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return next(t.dtype for t in tensors.values() if t.is_floating_point())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
