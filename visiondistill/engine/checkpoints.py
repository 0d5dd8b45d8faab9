"""Where a run's checkpoints lie, which one a run continues, and whether it is still the same run."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.engine import state
from visiondistill.engine.assembly import Assembly, Kept, Tensors
from visiondistill.engine.errors import DiskError, ResumeError, SettingsError
from visiondistill.engine.launch import World
from visiondistill.engine.method import Method
from visiondistill.engine.settings import Run, Stage
from visiondistill.engine.track import environment


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        return cls(*state.load(folder), folder)

    def of_stage(self, index: int, stage: Stage) -> Checkpoint:
        """This one, or the end of an earlier stage of the same run, which lies beside it."""
        if index == self.meta["stage"]:
            return self
        return Checkpoint.read(self.folder.parent / stage_name(index, stage))


@dataclass(frozen=True)
class Restored:
    """What a run had made when a checkpoint was written, on the CPU.

    Attributes:
        method: of the checkpoint's stage.
        product, ema: as in `Result`.
        stage: the stage's name.
        step: steps done, over all stages.
        last_stage: no stage follows.
        finished: no step follows.
    """

    method: Method
    product: nn.Module
    ema: nn.Module | None
    stage: str
    step: int
    last_stage: bool
    finished: bool


class Store:
    """The checkpoints of one run folder.

    `checkpoints/step_*` are the run's; `checkpoints/stage_*` keep the end of each finished stage,
    from which a resumed run rebuilds what later stages were handed.

    Raises:
        ResumeError: the folder is in use and `resume` does not say what to do with it.
    """

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        self.folder = Path(run.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self._finished: dict[str, Checkpoint] = {}
        self.require_free(run)
        world.barrier()

    @staticmethod
    def require_free(run: Run) -> None:
        """Raises ResumeError where the folder is in use and `resume` does not say what to do with it."""
        folder = Path(run.output_dir)
        used = [name for name in ("checkpoints", "metrics.jsonl") if (folder / name).exists()]
        if run.resume == "none" and used:
            raise ResumeError(
                f"{folder} already holds a run ({', '.join(used)}): set resume='auto' to continue it, "
                f"or choose another output_dir"
            )

    def describe(self, config: str | None) -> None:
        """Make the folder; keep where the run takes place, its recipe, and the stages that it goes on from.

        Raises:
            SettingsError: nothing can be written there.
        """
        if not self.world.first:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            state.write_text(self.folder / "env.json", json.dumps(environment(self.world), indent=1))
            if config is not None:
                state.write_text(self.folder / "config.yaml", config)
            for name, checkpoint in self._finished.items():
                # A run that continues in another folder must find its finished stages there the next time.
                if not (self.checkpoints / name).exists():
                    state.save(self.checkpoints / name, checkpoint.tensors, checkpoint.meta)
            if self.run.resume == "auto":
                # A kill after the last save, before the clean-up that belongs to it: no further save would follow.
                state.retain(self.checkpoints, self.run.keep, self.run.keep_every)
        except OSError as error:
            raise SettingsError(
                f"run.output_dir: {self.folder} cannot be written to ({error.strerror or error}): "
                f"choose a folder that this process may write to and that has room"
            ) from error

    def find(self) -> Checkpoint | None:
        """The checkpoint to continue from, if any.

        Raises:
            ResumeError: a path was named and there is no whole checkpoint.
        """
        if self.run.resume == "none":
            return None
        if self.run.resume == "auto":
            folder = state.newest(self.checkpoints)
            return Checkpoint.read(folder) if folder is not None else None
        return Checkpoint.read(checkpoint_in(Path(self.run.resume)))

    @staticmethod
    def earlier(run: Run) -> dict[str, Any] | None:
        """Settings of the run that `run` continues, if it continues one; damage is for `find` to report."""
        if run.resume == "none":
            return None
        if run.resume == "auto":
            folder = state.newest(Path(run.output_dir) / "checkpoints")
        else:
            folder = checkpoint_in(Path(run.resume))
        return None if folder is None else json.loads((folder / state.META).read_text())["run"]

    def restore(self, index: int, assembly: Assembly, checkpoint: Checkpoint | None, final: bool) -> int:
        """Bring stage `index`, the `final` one or not, to where the run stood; returns the first step to play."""
        if checkpoint is None or index > checkpoint.meta["stage"]:
            if index == 0 and self.run.init_from is not None:
                source = Checkpoint.read(checkpoint_in(Path(self.run.init_from)))
                assembly.load_weights(source.tensors.get("weights", {}))
            assembly.method.setup(assembly.method.streams)
            return 0
        if index < checkpoint.meta["stage"]:
            checkpoint = checkpoint.of_stage(index, assembly.stage)
        _check_same_run(assembly, checkpoint, self.run, self.world)
        step = checkpoint.meta["step"]
        assembly.unpack(checkpoint.tensors, checkpoint.meta["numbers"])
        assembly.schedule(step)
        if step == assembly.stage.steps and not final:
            self._finished[stage_name(index, assembly.stage)] = checkpoint
        return step

    def save(self, index: int, assembly: Assembly, step: int, global_step: int, block: int, final: bool) -> None:
        """Write the checkpoint of a step, and of a finished stage that others follow; then clean up."""
        if self.world.first:
            tensors, numbers = assembly.pack()
            meta = {
                "stage": index,
                "step": step,
                "global_step": global_step,
                "numbers": numbers,
                "noise_block": block,
                "run": dataclasses.asdict(self.run),
                "processes": self.world.size,
                "method": assembly.describe(),
                "rebuilt": assembly.fingerprint(),
            }
            if step == assembly.stage.steps and not final:
                # First, so that no checkpoint of a later step can be there without it.
                self._write(stage_name(index, assembly.stage), tensors, meta)
            self._write(f"step_{global_step:09d}", tensors, meta)
            state.retain(self.checkpoints, self.run.keep, self.run.keep_every)
        self.world.barrier()

    def _write(self, name: str, tensors: Tensors, meta: dict[str, Any]) -> None:
        try:
            state.save(self.checkpoints / name, tensors, meta)
        except OSError as error:
            size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
            raise DiskError(
                f"{self.checkpoints / name} could not be written ({error}). It takes {size:,} bytes, and while it is "
                f"written the ones before it stay, which are whole. Make room, or lower run.keep (it is "
                f"{self.run.keep}); then continue with run.resume=auto"
            ) from error


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest whole one of the run folder that it is.

    Raises:
        ResumeError: there is none.
    """
    if (path / state.MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise ResumeError(f"{path} does not exist: name a run folder or one of its checkpoints")
    folder = state.newest(path / "checkpoints")
    if folder is None:
        raise ResumeError(f"{path} holds no checkpoint: name a run folder or one of its checkpoints")
    return folder


def restore(stages: Sequence[Stage], run: Run, folder: Path) -> Restored:
    """The networks of a checkpoint, with no step played and nothing written.

    The way is that of `train`: stages are built in order, each is handed what the one before made,
    and each gets the tensors of its own checkpoint, strictly, after its settings and the weights of
    its rebuilt (frozen) networks were compared with those of then. An `Assembly` is made for it, optimisers
    and all, because it alone knows which tensors a checkpoint holds and what the average follows;
    a shorter way would be a second opinion on that. What cannot change a weight any more may
    differ: the device, the data, where a teacher's file lies, the settings of `run`, except that
    it is `run` which says whether there is an average.

    Args:
        folder: of the checkpoint, see `checkpoint_in`.

    Raises:
        ResumeError: damaged, or not of these stages.
    """
    checkpoint, kept, handover = Checkpoint.read(folder), Kept(), None
    last = checkpoint.meta["stage"]
    if last >= len(stages):
        raise ResumeError(f"{folder} is of stage {last + 1}, but there are {len(stages)} stages: it is of another run")
    for index, stage in enumerate(stages[: last + 1]):
        method = stage.method if isinstance(stage.method, Method) else stage.method(handover)
        assembly = Assembly(stage, method, run, World(torch.device("cpu")), kept)
        own = checkpoint.of_stage(index, stage)
        changes = _changes(assembly, own, {}, _without_sources)
        if changes:
            raise ResumeError(f"{own.folder} was made by other settings:\n  - " + "\n  - ".join(changes))
        assembly.unpack(own.tensors, own.meta["numbers"])
        assembly.release()
        handover = method.handover()
    return Restored(
        method=method,
        product=method.product(),
        ema=None if assembly.ema is None else assembly.ema.module(),
        stage=stage.name,
        step=checkpoint.meta["global_step"],
        last_stage=last == len(stages) - 1,
        finished=last == len(stages) - 1 and checkpoint.meta["step"] == stage.steps,
    )


def stage_name(index: int, stage: Stage) -> str:
    """Folder that keeps the end of a finished stage."""
    return f"stage_{index}_{stage.name}"


def _check_same_run(assembly: Assembly, checkpoint: Checkpoint, run: Run, world: World) -> None:
    meta = checkpoint.meta
    settings = {k: v for k, v in dataclasses.asdict(run).items() if k not in (*Run.MAY_DIFFER, *Run.ROUNDING)}
    changes = _changes(assembly, checkpoint, settings)
    if changes:
        raise ResumeError(
            f"{checkpoint.folder} is not this run, so it cannot be continued bit for bit:\n  - "
            + "\n  - ".join(changes)
            + "\nSet these back, or start a new run with init_from."
        )
    if (meta["processes"], meta["run"]["grad_accum_steps"]) != (world.size, run.grad_accum_steps):
        warnings.warn(
            "continuing with another number of processes or micro-batches: equal within rounding, not to the bit",
            stacklevel=2,
        )


def _changes(
    assembly: Assembly,
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    of: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[str]:
    """What is not as it was: of the stage (`of` its description) and of these settings."""
    meta, now = checkpoint.meta, json.loads(json.dumps(assembly.describe()))
    changes = _differences(
        {"run": {k: meta["run"].get(k) for k in settings}, "stage": of(meta["method"])},
        {"run": settings, "stage": of(now)},
    )
    if not changes and meta["rebuilt"] != assembly.fingerprint():
        changes = ["the frozen networks (teacher, base of adapters) hold other weights"]
    return changes


def _without_sources(description: dict[str, Any]) -> dict[str, Any]:
    """A stage's description without what it learned from, which may lie elsewhere by now."""
    told = description["hyperparameters"]
    kept = {name: own for name, own in told.items() if not name.startswith("frozen.")}
    return {**description, "streams": {}, "hyperparameters": kept}


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = sorted(set(then) | set(now))
        return [c for name in names for c in _differences(then.get(name), now.get(name), f"{path}.{name}".lstrip("."))]
    return [] if then == now else [f"{path}: was {then!r}, is {now!r}"]
