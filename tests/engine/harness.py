"""Play miniatures in this process, or under several gloo processes started as `torchrun` would.

Importing torch costs seconds, so one set of processes plays many jobs in sequence.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import miniatures
import torch
from safetensors.torch import load_file, save_file
from together import run_together
from torch import Tensor

from visiondistill.engine import Batch, Draw, Method, Run, Stage, Stream, Watch, train
from visiondistill.engine import state as engine_state
from visiondistill.engine.errors import TrainingError


@dataclass(frozen=True)
class Job:
    """One run of a miniature.

    Args:
        name: of the job and its output folder.
        miniature: a key of `miniatures.MINIATURES` or `EXTRA`.
        steps: over all stages.
        weights: seed of the players' initial weights.
        settings: of `Run`, over the miniature's own.
        local: let `gather_across` and `mean_across` do nothing, to see what would go unseen.
        signal_at: the last process gets SIGTERM while it prepares this step.
        signal_in_save: the first process gets SIGTERM while it writes the checkpoint of this step.
        poison_at: the last row of this step's batch is NaN.
    """

    name: str
    miniature: str
    steps: int = 20
    weights: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    local: bool = False
    signal_at: int | None = None
    signal_in_save: int | None = None
    poison_at: int | None = None


@dataclass
class Outcome:
    """What a run left behind: every tensor of its methods and of its average, and its loss curves."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    history: list[dict[str, float]]
    reason: str = ""
    error: str = ""

    @property
    def curve(self) -> dict[tuple[int, str], float]:
        return {(row["step"], name): value for row in self.history for name, value in row.items() if "/" in name}


def play(job: Job, folder: Path) -> Outcome:
    """Run `job` with its output below `folder`; an error of the engine becomes part of the outcome."""
    stages, settings = (miniatures.MINIATURES | miniatures.EXTRA)[job.miniature](job.weights, job.steps)

    def disturb(method: Method, before: int) -> None:
        if job.signal_at is not None:
            _signal(method, job.signal_at - before)
        if job.poison_at is not None:
            method.streams = {name: Poisoned(stream, job.poison_at - before) for name, stream in method.streams.items()}

    with ExitStack() as stack:
        if job.local:
            for name in ("gather_across", "mean_across"):
                stack.enter_context(mock.patch.object(miniatures, name, lambda x: x))
        if job.signal_in_save is not None:
            stack.enter_context(mock.patch.object(engine_state, "save", _interrupted_save(job.signal_in_save)))
        return train_stages(stages, settings | job.settings, folder / job.name, disturb)


def train_stages(
    stages: Sequence[Stage],
    settings: dict[str, Any],
    output: Path,
    adjust: Callable[[Method, int], None] = lambda method, before: None,
    watch: Watch | None = None,
) -> Outcome:
    """Train with a metric line for every step; `adjust` gets each method and the steps before its stage."""
    built: list[Method] = []
    run = Run(**{"output_dir": str(output), "log_every": 1, "progress": False, "device": "cpu"} | settings)
    starts = itertools.accumulate((stage.steps for stage in stages), initial=0)
    result, error = None, ""
    try:
        noted = [_noted(stage, built, adjust, start) for stage, start in zip(stages, starts, strict=False)]
        result = train(noted, run, watch=watch)
    except TrainingError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return Outcome(
        weights=state(*built),
        ema=state(result.ema) if result and result.ema is not None else {},
        history=result.history if result else [],
        reason=result.reason if result else "",
        error=error,
    )


def _noted(stage: Stage, built: list[Method], adjust: Callable[[Method, int], None], before: int) -> Stage:
    """`stage`, whose method will be found in `built` however it is made."""

    def build(handover: Any) -> Method:
        built.append(stage.method if isinstance(stage.method, Method) else stage.method(handover))
        adjust(built[-1], before)
        return built[-1]

    return Stage(build, stage.steps, stage.optim, stage.name)


def override(method: Method, **hooks: Callable[..., Any]) -> None:
    """Give this one method other hooks, as a subclass of the same name would."""
    kind = type(method)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    method.__class__ = type(kind.__name__, (kind,), hooks | names)


def _signal(method: Method, step: int) -> None:
    kind, last = type(method), int(os.environ.get("WORLD_SIZE", "1")) - 1

    def prepare(self: Method, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        if draw.step == step and int(os.environ.get("RANK", "0")) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return kind.prepare(self, batch, draw, due)

    override(method, prepare=prepare)


def _interrupted_save(step: int) -> Callable[..., Path]:
    save = engine_state.save

    def interrupted(folder: Path, *contents: Any) -> Path:
        if folder.name == f"step_{step:09d}":
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, *contents)

    return interrupted


class Poisoned:
    """A stream whose last row is NaN at one step; that row is on the last process, in its last micro-batch."""

    def __init__(self, stream: Stream, step: int) -> None:
        self.stream, self.batch_size, self._step = stream, stream.batch_size, step

    def open(
        self, start: int, rows: Sequence[tuple[int, int]], seed: int, device: torch.device
    ) -> Iterator[list[Batch]]:
        for step, parts in enumerate(self.stream.open(start, rows, seed, device), start):
            if step == self._step:
                last = rows.index(max(rows))
                parts[last] = {
                    name: self._spoil(x) if max(rows)[1] == self.batch_size else x for name, x in parts[last].items()
                }
            yield parts

    @staticmethod
    def _spoil(column: Tensor) -> Tensor:
        if not column.is_floating_point():
            return column
        return torch.cat([column[:-1], torch.full_like(column[-1:], torch.nan)])


def state(*modules: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors, named with the module's place."""
    return {
        f"{place}.{name}": tensor.detach().clone()
        for place, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def play_all(jobs: Sequence[Job], folder: Path) -> dict[str, Outcome]:
    return {job.name: play(job, folder) for job in jobs}


def spawn(jobs: Sequence[Job], folder: Path, processes: int = 2, timeout: float = 600.0) -> dict[str, list[Outcome]]:
    """Play `jobs` in sequence under `processes` processes; one outcome per rank for each job's name.

    Raises:
        RuntimeError: a process failed or `timeout` seconds have passed; all are gone by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    run_together(__file__, folder, processes, timeout)
    return {job.name: [_read(folder, job, rank) for rank in range(processes)] for job in jobs}


def _work(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for entry in json.loads((folder / "jobs.json").read_text()):
        job = Job(**entry)
        outcome = play(job, folder)
        name = f"{job.name}.rank{rank}"
        save_file(_contiguous(outcome.weights), folder / f"{name}.weights.safetensors")
        save_file(_contiguous(outcome.ema), folder / f"{name}.ema.safetensors")
        rest = {"history": outcome.history, "reason": outcome.reason, "error": outcome.error}
        (folder / f"{name}.json").write_text(json.dumps(rest))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read(folder: Path, job: Job, rank: int) -> Outcome:
    name = folder / f"{job.name}.rank{rank}"
    return Outcome(
        load_file(f"{name}.weights.safetensors"),
        load_file(f"{name}.ema.safetensors"),
        **json.loads(Path(f"{name}.json").read_text()),
    )


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference; the names must agree."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max((float((one[name].double() - other[name].double()).abs().max()) for name in one), default=0.0)


def curves_apart(one: Outcome, other: Outcome, since: int = 0) -> float:
    """Largest difference between the loss curves from step `since` on; the same points must be there."""
    left, right = ({at: value for at, value in o.curve.items() if at[0] >= since} for o in (one, other))
    assert left, "there is no curve to compare"
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())[:5]
    return max(abs(left[at] - right[at]) for at in left)


def uninterrupted(miniature: str, stop: int) -> Job:
    """A run that leaves a checkpoint at step `stop`."""
    return Job(f"{miniature}-whole", miniature, settings={"checkpoint_every": stop, "keep": 5})


def continued(miniature: str, stop: int, folder: Path) -> Job:
    """That run again from step `stop`; other initial weights: all that matters must come from the checkpoint."""
    checkpoint = folder / uninterrupted(miniature, stop).name / "checkpoints" / f"step_{stop:09d}"
    return Job(f"{miniature}-continued", miniature, weights=7, settings={"resume": str(checkpoint)})


POISONED_TERM = {
    "hint": ("turn 'student'", "student/label/ce"),
    "dmd2": ("turn 'critic'", "critic/gan"),
    "mutual": ("turn 'both'", "both/left/ce"),
    "projected": ("turn 'student'", "student/teacher/kl"),
    "bilevel": ("turn 'student'", "student/fused"),
    "adversarial": ("turn 'augmentor'", "augmentor/disagreement"),
    "matching": ("turn 'images'", "images/match"),
    "bank": ("turn 'student'", "student/instance"),
    "preference": ("turn 'judge'", "judge/rank"),
    "batch_norm": ("turn 'augmentor'", "augmentor/disagreement"),
    "relational": ("turn 'student'", "student/label/ce"),
    "offset": ("turn 'student'", "student/fit"),
}
"""Turn and term that the poisoned row reaches first."""


def poisoned(miniature: str, step: int, log_every: int = 1) -> Job:
    settings = {"log_every": log_every, "checkpoint_every": 5}
    return Job(f"{miniature}-poisoned-{log_every}", miniature, settings=settings, poison_at=step)


def assert_continues(whole: Outcome, continued: Outcome, since: int) -> None:
    assert not whole.error
    assert not continued.error
    assert_same(whole.weights, continued.weights)
    assert_same(whole.ema, continued.ema)
    assert curves_apart(whole, continued, since + 1) == 0.0


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], but: Callable[[str], bool] | None = None) -> None:
    """Bit for bit, except for names that `but` picks."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    unequal = [name for name in one if not (but and but(name)) and not torch.equal(one[name], other[name])]
    assert not unequal, unequal


if __name__ == "__main__":
    torch.set_num_threads(1)
    _work(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # taking the process group apart can last ten seconds
