"""Which switches of speed pay for a run on this hardware: tried before step 1, on copies of the method.

Channels-last weights, bf16 autocast and compilation are tried in turn, each on top of those that
were kept; it is kept too if the whole run, its one-time cost included, should then take clearly less.
"""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from visiondistill.engine.assembly import Assembly, Kept
from visiondistill.engine.checkpoints import Store
from visiondistill.engine.compile import FrozenCompiled, compiler_settings
from visiondistill.engine.launch import World, launch
from visiondistill.engine.memory import memory_advice
from visiondistill.engine.method import Method
from visiondistill.engine.settings import Run, Stage
from visiondistill.engine.shares import Shares
from visiondistill.engine.step import Context, Step

SWITCHES: dict[str, Any] = {"channels_last": True, "mixed_precision": "bf16", "compile": True}
"""What is tried, in this order, where the run leaves it off."""

WORTH = 0.95
"""A switch is kept if the run is expected to take less than this share of its time without."""

CYCLES = 6
"""Rounds of turns that are timed: a round has as many steps as the rarest turn's `every`."""
MOST = 24
"""Steps that are timed at most."""


@dataclass(frozen=True)
class Cost:
    """What steps took: `once` seconds before the steady state, then `step` seconds each.

    `step` is the median, or the mean where the rounds of turns make steps differ.
    """

    once: float
    step: float

    def of(self, steps: int) -> float:
        return self.once + self.step * steps


def fastest(stage: Stage, run: Run, steps: int) -> tuple[Run, list[str]]:
    """The run with the switches that pay, and a line for people about each one tried.

    Every process must call it. The method that will be trained is left as it is. A continued run
    keeps what was picked when it began.

    Args:
        stage: whose method is tried.
        run: what is on in it stays on.
        steps: of the whole run, over which one-time costs are spread.
    """
    world = launch(run.device)
    earlier = Store.earlier(run)
    if earlier is not None:
        return replace(run, **{name: earlier[name] for name in SWITCHES}), ["as picked when the run began"]
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        method = _own_copy(stage.method).to(world.device)
        method.setup(method.streams)
        with memory_advice(run, [stage]):
            best = _measured(stage, method, run, world)
        lines = [f"as set: {_told(best)}"]
        for name, value in SWITCHES.items():
            if getattr(run, name) != Run.__dataclass_fields__[name].default:
                continue
            tried = replace(run, **{name: value})
            cost, reason = _attempt(stage, method, tried, world)
            keeps = cost is not None and cost.of(steps) < WORTH * best.of(steps)
            if keeps:
                run, best = tried, cost
            verdict = "kept" if keeps else "left off"
            lines.append(f"+ {name}={value}: {_told(cost) if cost is not None else reason}: {verdict}")
    return run, lines


def _attempt(stage: Stage, method: Method, run: Run, world: World) -> tuple[Cost | None, str]:
    cost, reason = None, ""
    try:
        cost = _measured(stage, method, run, world)
    except Exception as error:  # a compiler that is missing, a kernel without bf16: whatever this device cannot do
        reason = f"not possible here ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return (None, reason or "not possible on another process") if world.any(cost is None) else (cost, "")


def _measured(stage: Stage, method: Method, run: Run, world: World) -> Cost:
    """Time the first steps of the stage on a copy of its method."""
    assembly = Assembly(replace(stage, method=method), _own_copy(method), run, world, Kept())
    shares = Shares(assembly.method.streams, run, world)
    update = Step(Context(assembly, None), shares)
    timed = min(CYCLES * max(turn.every for turn in assembly.turns), MOST)
    frozen = FrozenCompiled(assembly.method.frozen.values(), run)
    seconds, feed = [], shares.feed(0)
    try:
        with compiler_settings() if run.compile else nullcontext():
            for step in range(2 + timed):
                started = perf_counter()
                update(step, next(feed))
                _wait(world)
                seconds.append(perf_counter() - started)
    finally:
        feed.close()
        frozen.release()
        if run.compile:
            torch._dynamo.reset()
    steady = statistics.fmean(seconds[2:]) if timed > CYCLES else statistics.median(seconds[2:])
    return _slowest(Cost(max(sum(seconds[:2]) - 2 * steady, 0.0), steady), world)


def _own_copy(method: Method) -> Method:
    """A method of its own over the same data."""
    return copy.deepcopy(method, {id(stream): stream for stream in method.streams.values()})


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _slowest(cost: Cost, world: World) -> Cost:
    if world.size == 1:
        return cost
    both = torch.tensor([cost.once, cost.step], dtype=torch.float64, device=world.device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return Cost(*both.tolist())


def _told(cost: Cost) -> str:
    once = f", after {cost.once:.0f} s" if cost.once >= 1 else ""
    return f"{cost.step * 1e3:.1f} ms a step{once}"
