"""The training loop. One batch, from loader to optimiser:

    feed -> Step (prepare, each due turn: loss, backward, guard, optimiser, average) -> look -> log -> checkpoint

It knows neither teachers nor noise nor data sets; all that a method is stands in `method.py`.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from visiondistill.engine import replay
from visiondistill.engine.assembly import Assembly, Kept
from visiondistill.engine.checkpoints import Checkpoint, Store
from visiondistill.engine.compile import FrozenCompiled, compiler_settings
from visiondistill.engine.errors import NonFinite, SettingsError
from visiondistill.engine.launch import World, launch, repeatable
from visiondistill.engine.memory import memory_advice
from visiondistill.engine.method import Method, Terms
from visiondistill.engine.proof import Proof, Verdict
from visiondistill.engine.report import Reports
from visiondistill.engine.rng import key
from visiondistill.engine.settings import Run, Stage
from visiondistill.engine.shares import Shares
from visiondistill.engine.signals import Signals
from visiondistill.engine.step import Context, Step
from visiondistill.engine.track import Tracker

Watch = Callable[[nn.Module, int], Mapping[str, float]]
"""`watch(product, step) -> {name: figure}`: looks at the product after `step` steps of the run.

The product is a copy in eval mode, with averaged weights where an average is kept, so that nothing
that is done to it reaches the training. Every process calls the watch; the first one's figures are logged.
"""

Use = Literal["auto", "ema", "raw"]
"""The averaged weights of a product, its raw ones, or the average where one was kept."""


@dataclass
class Result:
    """What a run leaves behind.

    Attributes:
        product: the last stage's product, with its raw weights.
        ema: a copy of it with the averaged weights, where an average was kept.
        history: the lines of metrics.jsonl; "<turn>/<term>" are means over a window of steps.
        output_dir: the run folder.
        step: steps done, over all stages.
        reason: "finished", or the name of the signal that asked for an end ("SIGTERM").
        proofs: the proof of learning of each stage whose window was filled.
        method: the last stage's method.
    """

    product: nn.Module
    ema: nn.Module | None
    history: list[dict[str, Any]]
    output_dir: Path
    step: int
    reason: str
    proofs: dict[str, Verdict]
    method: Method

    def choose(self, use: Use = "auto") -> tuple[nn.Module, str]:
        """The product with the weights that are asked for, and which these are: "EMA" or "raw".

        Raises:
            ValueError: the average is asked for and none was kept.
        """
        if use == "ema" and self.ema is None:
            raise ValueError("this run kept no average (run.ema_decay is null): take the raw weights")
        return (self.product, "raw") if self.ema is None or use == "raw" else (self.ema, "EMA")


def train(stages: Sequence[Stage], run: Run, config: str | None = None, watch: Watch | None = None) -> Result:
    """Train the stages in order, resuming where the run asks for it.

    Args:
        stages: methods with their lengths, in order.
        run: everything else.
        config: the recipe's text, kept in the run folder as `config.yaml`.
        watch: called every `run.evaluate_every` steps and at the end of each stage.

    Raises:
        SettingsError: settings, networks and data do not fit together (before the first step).
        ResumeError: the run folder cannot be continued, or is already in use.
        NonFinite: a term or gradient was not finite. Weights are those of the last good update.
        OutOfMemory: with the settings that take less.
        DiskError: a checkpoint could not be written. Those before it are whole.
        NoGradient, NotLearning: a player or term takes no part in learning.
    """
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"a run needs at least one stage, and different names for them; got {names}")
    world = launch(run.device)
    store = Store(run, world)
    checkpoint = store.find()
    done = checkpoint.meta["global_step"] if checkpoint else 0
    total = sum(stage.steps for stage in stages)
    reports = Reports(run, config, done)
    compiling = compiler_settings() if run.compile else nullcontext()
    exactly = repeatable() if run.deterministic else nullcontext()
    with compiling, exactly, Signals(world) as signals, ExitStack() as stack, memory_advice(run, stages):

        def begin() -> Tracker:
            store.describe(config)
            tracker = Tracker(store.folder, world, total, done, run.batch_size, run.progress, reports)
            if run.resume != "none":
                tracker.say(store.continues(checkpoint))
            return stack.enter_context(tracker)

        result = _Session(stages, run, world, store, signals, begin, watch).play(checkpoint)
    if world.any(signals.received is not None):
        # Whether or not all steps were done by then: who asks for an end does not want an evaluation to follow.
        result.reason = signal.Signals(signals.received or signal.SIGTERM).name
    return result


class _Session:
    """One call of `train`: the stages of a run in one folder."""

    def __init__(
        self,
        stages: Sequence[Stage],
        run: Run,
        world: World,
        store: Store,
        signals: Signals,
        begin: Callable[[], Tracker],
        watch: Watch | None,
    ) -> None:
        self.stages, self.run, self.world, self.store = stages, run, world, store
        self.signals, self.begin = signals, begin
        self.watch = watch if run.evaluate_every else None
        self.kept = Kept()
        self.stopped = False
        self.proofs: dict[str, Verdict] = {}

    def play(self, checkpoint: Checkpoint | None) -> Result:
        """Play the stages, up to a signal if one comes; `train` then notes it as the result's reason."""
        handover: Any = None
        before = step = 0
        for index, stage in enumerate(self.stages):
            method = stage.build(handover)
            # Steps count from 0 in every stage, noise and batches must not.
            run = replace(self.run, seed=key(self.run.seed, "stage", index)) if index else self.run
            assembly = Assembly(stage, method, run, self.world, self.kept)
            shares = Shares(method.streams, run, self.world, checkpoint.meta["noise_block"] if checkpoint else None)
            first = self.store.restore(index, assembly, checkpoint, final=stage is self.stages[-1])
            if index == (checkpoint.meta["stage"] if checkpoint else 0):
                # Not earlier: until it is known to be this run's, the folder is left as it is.
                self.tracker = self.begin()
            frozen = FrozenCompiled(method.frozen.values(), self.run)
            try:
                step = self._stage(index, assembly, shares, first, before) if first < stage.steps else first
            finally:
                shares.close()
                assembly.release()
                frozen.release()
            before += step
            if step < stage.steps or (self.stopped and stage is not self.stages[-1]):
                break
            handover = method.handover()
        return Result(
            product=method.presented(method.product()),
            ema=method.presented(assembly.ema.module()) if assembly.ema is not None else None,
            history=self.tracker.history,
            output_dir=self.store.folder,
            step=before,
            reason="finished",
            proofs=self.proofs,
            method=method,
        )

    def _stage(self, index: int, assembly: Assembly, shares: Shares, first: int, before: int) -> int:
        """Play a stage from step `first` on; returns the steps done, fewer than all if a signal came."""
        run, tracker, stage = self.run, self.tracker, assembly.stage
        proof = self._proof(assembly, first)
        update = Step(Context(assembly, proof), shares)
        self._say_costs(assembly)
        feed = shares.feed(first)
        tracker.restart()
        for step in range(first, stage.steps):
            started = perf_counter()
            batches = next(feed)
            tracker.waited(perf_counter() - started)
            update(step, batches)
            done = step + 1
            tracker.stepped()
            if proof is not None and not proof.open(done):
                self.proofs[stage.name] = proof.judge()
                proof = update.context.proof = None
            looks = self.watch is not None and (done == stage.steps or done % run.evaluate_every == 0)
            polls = looks or done == stage.steps or done % run.log_every == 0
            figures = self._look(update, before + done) if looks else {}
            stops = self._stops(polls)
            if polls or stops:
                tracker.log(before + done, stage.name, self._read(update) | figures)
            if done == stage.steps or stops or (before + done) % run.checkpoint_every == 0:
                self._check_finite(update)
                if done == stage.steps and first == 0:
                    update.require_updates()
                self.store.save(index, assembly, done, before + done, shares.block, final=index == len(self.stages) - 1)
            if stops:
                return done
        if proof is not None:
            tracker.say(
                f"stage '{stage.name}' ended before proof of learning had seen {run.proof_window} updates a turn"
            )
        return stage.steps

    def _proof(self, assembly: Assembly, first: int) -> Proof | None:
        if not self.run.proof_window:
            return None
        method = assembly.method
        return Proof(
            assembly.turns,
            assembly.players,
            method.frozen,
            method.product(),
            assembly.ema,
            self.run.proof_window,
            first,
        )

    def _say_costs(self, assembly: Assembly) -> None:
        ungated = [name for name, player in assembly.players.items() if not player.gated]
        if ungated:
            self.tracker.say(
                f"the optimisers of {ungated} cannot skip an update on the device: one host sync per turn "
                f"(adam, adamw, sgd and momentum can)"
            )

    def _stops(self, polls: bool) -> bool:
        # Several processes must agree, and agreeing waits for all of them: only where they wait anyway.
        if self.world.size == 1 or polls:
            self.stopped = self.world.any(self.signals.received is not None)
        return self.stopped

    def _look(self, update: Step, step: int) -> dict[str, float]:
        self._check_finite(update)
        started, assembly = perf_counter(), update.context.assembly
        # A copy, so that a watch can leave modes, gradients and weights as it likes; generators are seeded by step.
        product = copy.deepcopy(assembly.method.product()).eval() if assembly.ema is None else assembly.ema.module()
        with torch.no_grad():
            figures = dict(self.watch(assembly.method.presented(product), step))
        self.tracker.paused(perf_counter() - started)
        return figures

    def _read(self, update: Step) -> dict[str, float]:
        """Mean terms since the last reading: the one place where the host waits for the device."""
        guard, turns = update.context.guard, [turn.name for turn in update.context.assembly.turns]
        # By turn, not as they were played: which turn of a cycle begins a window must not change a line's order.
        played = sorted(update.played, key=lambda each: turns.index(each[1]))
        tensors = [value.reshape(()) for _, _, terms in played for value in terms.values()]
        values = torch.stack([t.double() for t in [*tensors, guard.refused]])
        if self.world.size > 1:
            dist.all_reduce(values)
            values /= self.world.size
        *flat, refused = values.tolist()
        self._check_finite(update, refused)
        found: dict[str, list[float]] = {}
        numbers = iter(flat)
        for _, turn, terms in played:
            for name in terms:
                found.setdefault(f"{turn}/{name}", []).append(next(numbers))
        update.played.clear()
        # The highest: layers below the head may have lower ones.
        groups = {name: player.optimizer.param_groups for name, player in update.context.players.items()}
        rates = {f"lr/{name}": max(group["lr"] for group in own) for name, own in groups.items()}
        return {name: sum(values) / len(values) for name, values in found.items()} | rates

    def _check_finite(self, update: Step, refused: float | None = None) -> None:
        """Raises NonFinite where turns were refused; `refused` is their number if it has been read already."""
        refused = update.context.guard.refused.item() if refused is None else refused
        if refused:
            self._fail(update, *update.played[-min(round(refused), len(update.played))])

    def _fail(self, update: Step, step: int, turn: str, terms: Terms) -> NoReturn:
        """Keep a replay bundle of a refused turn's step, and raise NonFinite with what was not finite in it."""
        assembly, shares = update.context.assembly, update.shares
        method, run = assembly.method, assembly.run
        batches = next(shares.feed(step))
        assembly.release()
        meta = {
            "step": step,
            "turn": turn,
            "stage": assembly.stage.name,
            "seed": run.seed,
            "noise_block": shares.block,
            "rows": shares.micro,
            "whole": shares.whole,
            "micro_batches": len(batches),
            "rank": self.world.rank,
            "dtype": str(assembly.noise_dtype).removeprefix("torch."),
            "mixed_precision": run.mixed_precision,
        }
        found = replay.examine(method, batches, meta)
        found["not_finite"] = self.world.union(found["not_finite"])
        folder = self.store.folder / "replay" / f"step_{step:09d}_rank_{self.world.rank}"
        replay.write(folder, assembly.state, batches, meta | found)
        seen = {name: value.item() for name, value in terms.items()}
        causes = replay.places(found["not_finite"]) or ["a term or gradient (not on replay)"]
        lines = [f"step {step} of stage '{assembly.stage.name}', turn '{turn}': not finite, the cause first:"]
        lines += [f"  - {line}" for line in causes]
        lines += [
            f"Its terms: {seen}.",
            f"Nothing was updated from it; {folder} keeps it, and visiondistill.workbench.replay plays it again.",
            "Lower optim.*.lr, set optim.*.clip, or mend the inputs that are named here.",
        ]
        raise NonFinite("\n".join(lines))
