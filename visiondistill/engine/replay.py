"""A step that went wrong, kept so that it can be played again.

The folder holds the weights before the step, the batch of every micro-batch and what was found;
`replay` plays the step's losses on a method built the same way and names what is not finite.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiondistill.engine import state
from visiondistill.engine.errors import NAMED, some
from visiondistill.engine.method import Batch, Carry, Method, Turn
from visiondistill.engine.rng import Draw, Reseed
from visiondistill.engine.shares import Rows
from visiondistill.engine.step import autocast, handed_on, turn_inputs
from visiondistill.engine.tree import flatten, tree_join


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
        `{"terms": {"turn/term": value}, "not_finite": [...]}`, where `not_finite` names, in the order of
        computation, inputs ("train.image"), what `prepare` made of them ("teacher.logits"), state
        ("parts.kd.means"), terms ("student/kd") and gradients ("student: players.student.fc.weight").

    Raises:
        ResumeError: the folder is no such one, or damaged.
    """
    tensors, meta = state.load(Path(folder))
    own = method.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors["weights"].items():
            own[name].copy_(value)
    parts = [tensors.get(f"batch_{i}", {}) for i in range(meta["micro_batches"])]
    batches = [_nest({path: tensor.to(method.device) for path, tensor in part.items()}) for part in parts]
    return examine(method, batches, meta)


def examine(method: Method, batches: Sequence[Batch], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Terms of the step in `meta` and everything in it that is not finite; buffers stay as they were.

    The step is played as `Step` plays it, precision included, but for the updates between its turns.
    """
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    due = [turn for turn in method.turns() if turn.due(meta["step"])]
    wrong = [path for raw in batches for path in _wrong(raw)]
    micro = [_prepared(method, raw, rows, due, meta) for raw, rows in zip(batches, meta["rows"], strict=True)]
    whole = None
    if len(batches) > 1 and not all(turn.accumulate for turn in due):
        whole = _prepared(method, tree_join(batches), meta["whole"], due, meta)
    wrong += [path for batch in (*micro, whole or {}) for path in _wrong(batch)]
    wrong += _wrong(method.state_dict())
    terms: dict[str, float] = {}
    carried: list[Carry] = [{} for _ in batches]
    for turn in due:
        _set_modes(method, turn)
        inputs = turn_inputs(turn, micro, whole, carried)
        carried = handed_on(carried, _play(method, turn, inputs, meta, terms, wrong))
    method.train()
    with torch.no_grad():
        for name, buffer in method.named_buffers():
            buffer.copy_(buffers[name])
    return {"terms": terms, "not_finite": list(dict.fromkeys(wrong))}


def places(not_finite: Iterable[str]) -> list[str]:
    """What `examine` named, as lines of a message: inputs and state, terms, and a few tensors of each player."""
    groups: dict[str, list[str]] = {}
    for name in not_finite:
        player = re.match(r"(.+: )?players\.[^.]+", name)
        groups.setdefault(player[0] if player else name.partition("/")[1], []).append(name)
    # One tensor says that a player is lost; of what leads there more is worth a look.
    return [some(names, 3 if "players." in group else NAMED) for group, names in groups.items()]


def _prepared(method: Method, raw: Batch, rows: Rows, due: Sequence[Turn], meta: Mapping[str, Any]) -> Batch:
    rows = {name: tuple(span) for name, span in rows.items()}
    draw = Draw(meta["seed"], meta["step"], rows, meta["noise_block"], method.device, getattr(torch, meta["dtype"]))
    Reseed(method.device, meta["seed"], "prepare")(meta["step"], rows[""][0])
    _set_modes(method, due[0])
    with torch.no_grad(), autocast(meta["mixed_precision"], method.device):
        return method.prepare(dict(raw), draw, frozenset(turn.name for turn in due))


def _play(
    method: Method,
    turn: Turn,
    batches: Sequence[Batch],
    meta: Mapping[str, Any],
    terms: dict[str, float],
    wrong: list[str],
) -> list[Carry]:
    prefixes = tuple(f"players.{player}." for player in turn.moves)
    named = {name: p for name, p in method.named_parameters() if name.startswith(prefixes) and p.requires_grad}
    reseed, carries = Reseed(method.device, meta["seed"], turn.name, meta["rank"]), []
    for index, batch in enumerate(batches):
        reseed(meta["step"], index)
        with autocast(meta["mixed_precision"], method.device):
            found, carry = turn.loss(batch)
        for name, term in found.items():
            label = f"{turn.name}/{name}"
            terms[label] = terms.get(label, 0.0) + term.item() / len(batches)
            wrong += [label] * _bad(term)
        gradients = torch.autograd.grad(sum(found.values()), list(named.values()), allow_unused=True)
        wrong += [f"{turn.name}: {n}" for n, g in zip(named, gradients, strict=True) if g is not None and _bad(g)]
        carries.append({name: value.detach() for name, value in carry.items() if name != "skip"})
    return carries


def _set_modes(method: Method, turn: Turn) -> None:
    for name, player in method.players.items():
        player.train(name in turn.moves)


def _wrong(tree: Mapping[str, Any]) -> list[str]:
    return [path for path, tensor in flatten(tree) if _bad(tensor)]


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
