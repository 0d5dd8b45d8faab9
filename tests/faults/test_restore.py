"""Every bit of state comes back: all that a stage holds is disturbed, then restored from the checkpoint, then compared.

Two walks over the live objects guard the two directions. What changes from step to step and is in no
checkpoint would be found by the first; what is in the checkpoint and never read, by the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from harness import train_stages
from miniatures import MINIATURES, ROWS, Table, TinyNet, built
from torch import Tensor, nn

from visiondistill.engine import Optim, Stage, Stream, loop
from visiondistill.engine.assembly import Assembly
from visiondistill.engine.checkpoints import Checkpoint, Store
from visiondistill.engine.launch import World
from visiondistill.engine.settings import Run

STEP = 11
"""In mid-cycle, in the second stage of three, with schedules under way."""

ELSEWHERE = {
    ".stage": "settings",
    ".run": "settings",
    ".world": "settings",
    ".method.streams": "data; batches are a function of the step",
    ".buffers.saved": "what a refused update goes back to; taken anew before each step",
}
"""Below these paths nothing is restored."""

SCRATCH = {
    "overflow": "of a loss scale: 0 between steps",
    "found_inf": "of an optimiser: set before each of its steps",
    "training": "set before each turn",
    "_need_device_dtype_check_for_fused": "of an optimiser that has not stepped",
}
"""Nor is anything of these names."""


class Fp16(miniatures.Labels):
    """In fp32, so that autocast has something to do, and with a loss so large that the scale is halved at once."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        images = {name: x.float() if x.is_floating_point() else x for name, x in miniatures.images().columns.items()}
        self.streams: dict[str, Stream] = {"train": Table(**images)}

    def loss(self, batch: dict) -> tuple[dict, dict]:
        terms, carry = super().loss(batch)
        return {name: term.float() * 300 for name, term in terms.items()}, carry


def fp16(seed: int, steps: int = 20) -> tuple[list[Stage], dict[str, Any]]:
    settings = miniatures.SETTINGS | {"mixed_precision": "fp16"}
    return [Stage(Fp16(built(seed, TinyNet).float()), steps, {"student": Optim(lr=1e-2)})], settings


BUILDERS = MINIATURES | {"fp16": fp16}
NAMES = ["dmd2", "mutual", "bank", "batch_norm", "preference", "stages", "fp16"]
"""Cycles, two optimisers with schedules, written state, running statistics and dropout, adapters, stages, scales."""


def played(name: str, folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Assembly, Checkpoint]:
    """The stage at work when the run had done `steps`, and its checkpoint."""
    made: list[Assembly] = []

    class Noted(Assembly):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    stages, settings = BUILDERS[name](0, 20)
    saved = folder / "checkpoints" / f"step_{steps:09d}"

    def stop(self: Store, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        if saved.exists():
            raise StopIteration

    save = Store.save
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Assembly", Noted)
        patch.setattr(Store, "save", stop)
        # Looked at as it stood: `release` takes gradients and flags away at the end.
        with pytest.raises(StopIteration):
            train_stages(stages, settings | {"checkpoint_every": 1, "ema_warmup": True}, folder)
    return made[-1], Checkpoint.read(saved)


def fresh(name: str, checkpoint: Checkpoint, folder: Path) -> tuple[Assembly, Store]:
    """The same stage in a run that has just begun, from other initial weights."""
    stages, settings = BUILDERS[name](7, 20)
    run = Run(**{"output_dir": str(folder), "device": "cpu", "ema_warmup": True} | settings)
    world, kept, handover = World(torch.device("cpu")), loop.Kept(), None
    store = Store(run, world)
    for index, stage in enumerate(stages):
        method = (
            stage.method(handover)
            if callable(stage.method) and not isinstance(stage.method, nn.Module)
            else stage.method
        )
        assembly = Assembly(stage, method, run, world, kept)
        if index == checkpoint.meta["stage"]:
            return assembly, store
        store.restore(index, assembly, checkpoint, final=False)
        handover = method.handover()
    raise AssertionError("no such stage")


def walk(thing: object, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor | float | str]]:
    """Every tensor and plain value that can be reached, with its path."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor | bool | int | float | str) or thing is None:
        yield path, thing
        return
    if id(thing) in seen or isinstance(thing, type) or path in ELSEWHERE:
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        # Optimisers file their state under the parameter itself.
        for number, (name, entry) in enumerate(thing.items()):
            yield from walk(entry, f"{path}.{name if isinstance(name, str) else number}", seen)
    elif isinstance(thing, list | tuple):
        for number, entry in enumerate(thing):
            yield from walk(entry, f"{path}.{number}", seen)
    elif isinstance(thing, nn.Module) or (hasattr(thing, "__dict__") and not callable(thing)):
        yield from walk(vars(thing), path, seen)


def snapshot(assembly: Assembly) -> dict[str, Tensor | float | str | None]:
    return {
        path: value.detach().clone() if isinstance(value, Tensor) else value
        for path, value in walk(assembly)
        if path.rpartition(".")[2] not in SCRATCH
    }


def equal(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(path for path in one.keys() | other.keys() if not equal(one.get(path), other.get(path)))


def disturb(assembly: Assembly) -> int:
    """Change every tensor that a checkpoint holds, and scheduled learning rates; returns how many tensors."""
    for player in assembly.players.values():
        for parameter in player.parameters:
            parameter.grad = torch.zeros_like(parameter)
        player.optimizer.step()
        for group in player.optimizer.param_groups if player.scheduler is not None else ():
            group["lr"] += 1.0
    held = [tensor for group in assembly.pack()[0].values() for tensor in group.values()]
    with torch.no_grad():
        for tensor in held:
            tensor.copy_(tensor + 3)
    return len(held)


@pytest.mark.parametrize("name", NAMES)
def test_all_state_is_restored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then, checkpoint = played(name, tmp_path / "run", STEP, monkeypatch)
    expected = snapshot(then)
    now, store = fresh(name, checkpoint, tmp_path / "again")
    held = sum(len(group) for group in checkpoint.tensors.values())
    assert disturb(now) == held
    store.restore(checkpoint.meta["stage"], now, checkpoint, final=False)
    assert not differing(expected, snapshot(now))


@pytest.mark.parametrize("name", NAMES)
def test_each_entry_of_the_checkpoint_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tensor is changed in the file changes the restored stage."""
    _, checkpoint = played(name, tmp_path / "run", STEP, monkeypatch)
    now, store = fresh(name, checkpoint, tmp_path / "again")
    index = checkpoint.meta["stage"]
    store.restore(index, now, checkpoint, final=False)
    expected = snapshot(now)
    entries = [(file, key) for file, group in checkpoint.tensors.items() for key in group]
    assert {file for file, _ in entries} >= {"weights", "optimizers", "averages"}
    for file, key in entries:
        kept = checkpoint.tensors[file][key]
        checkpoint.tensors[file][key] = kept + 1
        store.restore(index, now, checkpoint, final=False)
        assert differing(expected, snapshot(now)), f"{file}: {key} is written and never read"
        checkpoint.tensors[file][key] = kept
    store.restore(index, now, checkpoint, final=False)
    assert not differing(expected, snapshot(now))


def test_forgotten_state_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that a checkpoint does not know, in a place where nobody expects it."""
    advance = Assembly.pack

    def count(self: Assembly) -> Any:
        player = next(iter(self.players.values()))
        player.scheduler_state = getattr(player, "scheduler_state", 0) + 1
        return advance(self)

    monkeypatch.setattr(Assembly, "pack", count)
    then, checkpoint = played("mutual", tmp_path / "run", STEP, monkeypatch)
    now, store = fresh("mutual", checkpoint, tmp_path / "again")
    disturb(now)
    store.restore(0, now, checkpoint, final=True)
    assert differing(snapshot(then), snapshot(now)) == [".players.left.scheduler_state"]


def test_the_stage_holds_what_the_data_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk reaches what it is meant to reach."""
    then, _ = played("bank", tmp_path / "run", STEP, monkeypatch)
    found = snapshot(then)
    for path in (".method._buffers.bank", ".ema.values.0", ".players.student.optimizer.state.0.exp_avg"):
        assert isinstance(found[path], Tensor), path
    assert found[".method._buffers.bank"].shape[0] == ROWS
    assert found[".players.student.optimizer.param_groups.0.lr"] == pytest.approx(1e-2)
    halved, _ = played("fp16", tmp_path / "fp16", STEP, monkeypatch)
    assert halved.scales["student"].scale < 2**16
