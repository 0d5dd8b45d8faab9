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
        """Check that the run folder is new, or that `resume` says what to do with what is there.

        Raises:
            ResumeError: it is in use and `resume` is "none".
        """
        folder = Path(run.output_dir)
        used = [name for name in ("checkpoints", "metrics.jsonl") if (folder / name).exists()]
        if run.resume == "none" and used:
            raise ResumeError(
                f"{folder} already holds a run ({', '.join(used)}): set resume='auto' to continue it, "
                f"or choose another output_dir"
            )

    def describe(self, config: str | None) -> None:
        """Make the folder and write into it the environment, the recipe, and the finished stages of a continued run.

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
        folder = _continued(self.run)
        return None if folder is None else Checkpoint.read(folder)

    def continues(self, checkpoint: Checkpoint | None) -> str:
        """What a run that was asked to go on says of where it begins."""
        if checkpoint is None:
            return f"starts anew: there is no checkpoint in {self.folder}"
        return f"goes on after step {checkpoint.meta['global_step']} ({checkpoint.folder})"

    @staticmethod
    def earlier(run: Run) -> dict[str, Any] | None:
        """Settings of the run that `run` continues; None where it continues none."""
        folder = _continued(run)
        return None if folder is None else json.loads((folder / state.META).read_text())["run"]

    def restore(self, index: int, assembly: Assembly, checkpoint: Checkpoint | None, final: bool) -> int:
        """Bring a stage to where the run stood.

        Args:
            index: of the stage.
            checkpoint: of the run that is continued; None starts anew.
            final: whether the stage is the last one.

        Returns:
            The first step to play.
        """
        if checkpoint is None or index > checkpoint.meta["stage"]:
            if index == 0 and self.run.init_from is not None:
                source = Checkpoint.read(checkpoint_in(Path(self.run.init_from)))
                assembly.load_weights(source.tensors.get("weights", {}))
            assembly.method.setup(assembly.method.streams)
            return 0
        checkpoint = checkpoint.of_stage(index, assembly.stage)
        _check_same_run(assembly, checkpoint, self.run, self.world)
        step = checkpoint.meta["step"]
        assembly.unpack(checkpoint.tensors, checkpoint.meta["numbers"])
        assembly.schedule(step)
        if step == assembly.stage.steps and not final:
            self._finished[stage_name(index, assembly.stage)] = checkpoint
        return step

    def save(self, index: int, assembly: Assembly, step: int, global_step: int, block: int, final: bool) -> None:
        """Write the checkpoint of a step, and that of a finished stage unless it is the final one; then clean up."""
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
            self._write(step_name(global_step), tensors, meta)
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

    As in `train`, stages are built in order, each is handed what the one before made, and each gets
    the tensors of its own checkpoint, strictly, once its settings and its frozen networks' weights
    have been compared with those that were saved. Each gets an `Assembly`, optimisers included: it
    alone knows which tensors a checkpoint holds and what the average follows. What can no longer
    change a weight may differ: the device, the data, where a teacher's file lies, and the settings
    of `run` but for `ema_decay`, which says whether there is an average.

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
        method = stage.build(handover)
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


def step_name(step: int) -> str:
    """Folder that keeps the state after a step, counted over all stages."""
    return f"step_{step:09d}"


def stage_name(index: int, stage: Stage) -> str:
    """Folder that keeps the end of a finished stage."""
    return f"stage_{index}_{stage.name}"


def _continued(run: Run) -> Path | None:
    """The folder of the checkpoint that a run continues, if it continues one."""
    if run.resume == "none":
        return None
    if run.resume == "auto":
        return state.newest(Path(run.output_dir) / "checkpoints")
    return checkpoint_in(Path(run.resume))


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
    compared: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[str]:
    """What differs from the checkpoint, a line each: run settings, the stage's description, frozen weights.

    Args:
        settings: of the run, those that are compared.
        compared: the part of a stage's description that is compared; by default all of it.
    """
    meta, now = checkpoint.meta, json.loads(json.dumps(assembly.describe()))
    changes = _differences(
        {"run": {k: meta["run"].get(k) for k in settings}, "stage": compared(meta["method"])},
        {"run": settings, "stage": compared(now)},
    )
    if not changes and meta["rebuilt"] != assembly.fingerprint():
        changes = ["the frozen networks (teacher, base of adapters) hold other weights"]
    return changes


def _without_sources(description: dict[str, Any]) -> dict[str, Any]:
    """A stage's description without its data and frozen networks, whose files may lie elsewhere by now."""
    kept = {name: own for name, own in description["hyperparameters"].items() if not name.startswith("frozen.")}
    return {**description, "streams": {}, "hyperparameters": kept}


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = sorted(set(then) | set(now))
        return [c for name in names for c in _differences(then.get(name), now.get(name), f"{path}.{name}".lstrip("."))]
    return [] if then == now else [f"{path}: was {then!r}, is {now!r}"]
