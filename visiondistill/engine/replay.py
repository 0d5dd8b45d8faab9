"""A step that went wrong, kept so that it can be played again.

The folder holds the weights before the step, the batch of every micro-batch and what was found;
`replay` plays the step's losses on a method built the same way and names what is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiondistill.engine import state
from visiondistill.engine.method import Batch, Carry, Method, Turn
from visiondistill.engine.rng import Draw, Reseed
from visiondistill.engine.tree import flatten


def write(folder: Path, weights: Mapping[str, Tensor], batches: Sequence[Batch], meta: Mapping[str, Any]) -> Path:
    """Keep weights and batches in `folder`, beside the checkpoints and never as one."""
    parts = {f"batch_{i}": dict(flatten(batch)) for i, batch in enumerate(batches)}
    return state.save(folder, {"weights": weights} | {name: part for name, part in parts.items() if part}, meta)


def replay(method: Method, folder: str | Path) -> dict[str, Any]:
    """Play a kept step again on `method`, without moving anything.

    Args:
        method: built as for the run (its weights are overwritten by the kept ones).
        folder: the `replay/step_*` folder of the run.

    Returns:
        `{"terms": {"turn/term": value}, "not_finite": [...]}`, where `not_finite` names inputs
        ("train.image"), terms ("student/kd") and gradients ("student: players.student.fc.weight").
    """
    tensors, meta = state.load(Path(folder))
    own = method.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors["weights"].items():
            own[name].copy_(value)
    batches = [_nest(tensors.get(f"batch_{i}", {})) for i in range(meta["micro_batches"])]
    return examine(method, batches, meta)


def examine(method: Method, batches: Sequence[Batch], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Terms of the step in `meta` and everything in it that is not finite; buffers stay as they were."""
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    due = [turn for turn in method.turns() if turn.due(meta["step"])]
    terms: dict[str, float] = {}
    wrong: list[str] = []
    for index, raw in enumerate(batches):
        wrong += [path for path, tensor in flatten(raw) if _bad(tensor)]
        rows = {name: tuple(span) for name, span in meta["rows"][index].items()}
        draw = Draw(meta["seed"], meta["step"], rows, meta["noise_block"], method.device, getattr(torch, meta["dtype"]))
        Reseed(method.device, meta["seed"], "prepare")(meta["step"], rows[""][0])
        _set_modes(method, due[0])
        with torch.no_grad():
            batch = method.prepare(dict(raw), draw, frozenset(turn.name for turn in due))
        for turn in due:
            Reseed(method.device, meta["seed"], turn.name, meta["rank"])(meta["step"], index)
            _set_modes(method, turn)
            batch |= _play(method, turn, batch, terms, wrong)
    method.train()
    with torch.no_grad():
        for name, buffer in method.named_buffers():
            buffer.copy_(buffers[name])
    return {"terms": terms, "not_finite": list(dict.fromkeys(wrong))}


def _play(method: Method, turn: Turn, batch: Batch, terms: dict[str, float], wrong: list[str]) -> Carry:
    named = {
        name: p
        for player in turn.moves
        for name, p in method.named_parameters()
        if name.startswith(f"players.{player}.") and p.requires_grad
    }
    found, carry = turn.loss(batch)
    for name, term in found.items():
        terms[f"{turn.name}/{name}"] = term.item()
        if _bad(term):
            wrong.append(f"{turn.name}/{name}")
    gradients = torch.autograd.grad(sum(found.values()), list(named.values()), allow_unused=True)
    wrong += [f"{turn.name}: {n}" for n, g in zip(named, gradients, strict=True) if g is not None and _bad(g)]
    return {name: value.detach() for name, value in carry.items() if name != "skip"}


def _set_modes(method: Method, turn: Turn) -> None:
    for name, player in method.players.items():
        player.train(name in turn.moves)


def _bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())


def _nest(flat: Mapping[str, Tensor]) -> Batch:
    nested: Batch = {}
    for path, tensor in flat.items():
        *outer, name = path.split(".")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = tensor
    return nested
