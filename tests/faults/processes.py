"""Real training processes to be killed, signalled and starved, and what they left behind.

`Nursery` is the test's side: it holds one process that has imported everything and forks a run at
a time, so that a run costs no import. Below `SERVER` is what happens over there: a run is built,
and its hooks tell the test's `Act`s when a step, a phase of a save, a compilation, a look, the
evaluation or the export is reached. The product has no line of this.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from miniatures import CLASSES, TinyNet, built, kl
from torch import Tensor, nn

from visiondistill.data import Stream, TensorData
from visiondistill.engine import (
    Batch,
    Carry,
    Draw,
    Method,
    Optim,
    Run,
    Stage,
    Terms,
    Turn,
    gather_across,
    loop,
    state,
    train,
)
from visiondistill.engine.checkpoints import Store
from visiondistill.engine.signals import Signals
from visiondistill.engine.step import Step

ROWS, BATCH = 48, 8
EPOCH = ROWS // BATCH
TEACHER_STEPS, STUDENT_STEPS = 10, 20
STEPS = TEACHER_STEPS + STUDENT_STEPS

PATIENCE = 300.0
"""Seconds after which a process that should have ended is killed, on however busy a machine."""


@dataclass(frozen=True)
class Act:
    """What happens when a phase is reached.

    Args:
        phase: a name that `reached` is called with, such as "step" or "save.replace".
        nth: at which time in this process, from 1.
        do: a signal's name, with "group" before it to the whole process group, with "twice" two times, with
            "soon" half a second later; "raise"; "fill <path>" writes to the file until its disk is full;
            "limit <bytes>" lets no file grow larger.
    """

    phase: str
    nth: int
    do: str


@dataclass(frozen=True)
class Job:
    """One process.

    Args:
        folder: of the run.
        beside: with ".log" and ".phases" appended, where the process says what it does; by default beside `folder`.
        settings: of `Run`, over those of `main_settings`.
        acts: what goes wrong.
        workers: loader processes.
        weights: seed of the initial weights; all that matters must come from a checkpoint.
        kind: a function of this module, from a job to an exit code.
        words: arguments of the command line, for `command`.
        rank, size, port: of several processes that train together.
    """

    folder: str
    settings: dict[str, Any] = field(default_factory=dict)
    acts: tuple[Act, ...] = ()
    workers: int = 0
    weights: int = 0
    kind: str = "duel"
    words: tuple[str, ...] = ()
    rank: int = 0
    size: int = 1
    port: int = 0
    beside: str = ""


class Child:
    """A forked run."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.nursery, self.pid, self.log = nursery, pid, log

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code as a shell gives it (128 + n after signal n). Kills the process at the deadline, and fails."""
        code = self.nursery.ask({"wait": self.pid, "timeout": timeout})["code"]
        assert code is not None, f"still running after {timeout} s:\n{self.said}"
        return code

    @property
    def said(self) -> str:
        """The end of what it printed, errors included."""
        return self.log.read_text(errors="replace")[-6000:]


class Nursery:
    """Context manager: the process that forks runs."""

    def __init__(self) -> None:
        tests = Path(__file__).parents[1]
        path = os.pathsep.join(map(str, (tests / "engine", tests / "faults", tests.parent)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stdin.close()
        self._server.wait()

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, job: Job) -> Child:
        return Child(self, self.ask({"start": asdict(job)})["pid"], _beside(job, "log"))

    def run(self, job: Job, timeout: float = PATIENCE) -> tuple[int, str]:
        """Exit code and output."""
        child = self.start(job)
        return child.wait(timeout), child.said


def _beside(job: Job, kind: str) -> Path:
    beside = job.beside or job.folder
    return Path(f"{beside}.{job.rank}.{kind}" if job.size > 1 else f"{beside}.{kind}")


def phases(job: Job) -> list[tuple[str, int]]:
    """Every phase that a finished process went through, with its number, in order."""
    seen: Counter[str] = Counter()
    numbered = []
    for phase in _beside(job, "phases").read_text().split():
        seen[phase] += 1
        numbered.append((phase, seen[phase]))
    return numbered


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints of a run, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def left_behind(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """sha256 of all tensors at `step` (weights, optimisers, averages), the optimisers' numbers, and the curve."""
    checkpoint = folder / "checkpoints" / f"step_{step:09d}"
    state.verify(checkpoint)
    sums = json.loads((checkpoint / state.MANIFEST).read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = ("images_per_second", "data_wait")
    return {
        "files": {name: value for name, value in sums.items() if name != "meta.json"},
        "numbers": json.loads((checkpoint / "meta.json").read_text())["numbers"],
        "curve": [{name: value for name, value in line.items() if name not in timings} for line in lines],
    }


# ------------------------------------------------------------------------------------------------------------- SERVER


class Pictures:
    """Map-style images of `CLASSES` classes, 4x4, float64, with noise of each epoch's own from the seeded generator."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = index % CLASSES
        return {"image": (torch.rand(1, 4, 4, dtype=torch.float64) + label) / CLASSES, "label": label}


class Taught(Method):
    """Cross-entropy with BatchNorm and dropout; what it makes teaches the next stage."""

    def __init__(self, student: nn.Module, stream: Stream) -> None:
        super().__init__({"student": student}, streams={"train": stream})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("labels", self.loss, moves=("student",)),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        return {"ce": F.cross_entropy(self.players["student"](batch["train"]["image"]), batch["train"]["label"])}, {}


class Duel(Method):
    """A critic tells the teacher's answers from the student's; every third step the student learns to pass for it.

    `memory` keeps, for each image, what the student said of it last.
    """

    def __init__(self, student: nn.Module, critic: nn.Module, teacher: nn.Module, stream: Stream) -> None:
        super().__init__({"student": student, "critic": critic}, {"teacher": teacher}, {"train": stream})
        self.register_buffer("memory", torch.zeros(ROWS, CLASSES, dtype=torch.float64))

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("student", self.student_loss, moves=("student",), every=3),
            Turn("critic", self.critic_loss, moves=("critic",)),
        )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        image = batch["train"]["image"]
        noisy = image + 0.1 * draw.normal("noise", *image.shape[1:]).to(image)
        return batch | {"noisy": noisy, "teacher_logits": self.frozen["teacher"](noisy)}

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        logits = self.players["student"](batch["noisy"])
        remembered = self.memory[batch["train"]["index"]]
        return {
            "kl": kl(logits, batch["teacher_logits"]).mean(),
            "steady": 0.1 * F.mse_loss(logits, remembered),
            "fool": 0.1 * F.softplus(-self.players["critic"](logits)).mean(),
        }, {"index": batch["train"]["index"], "logits": logits}

    def critic_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        with torch.no_grad():
            said = self.players["student"](batch["noisy"])
        critic = self.players["critic"]
        theirs, ours = critic(batch["teacher_logits"]), critic(said)
        return {"real": F.softplus(-theirs).mean(), "fake": F.softplus(ours).mean()}, {}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        if turn != "student":
            return {}
        return {"memory": (gather_across(carry["index"]), gather_across(carry["logits"]))}


def main_settings() -> dict[str, Any]:
    return {
        **{"batch_size": BATCH, "noise_block": 2, "ema_decay": 0.9, "ema_warmup": True, "device": "cpu"},
        **{"log_every": 1, "checkpoint_every": 4, "progress": False, "proof_window": 2, "resume": "auto"},
    }


def duel_stages(job: Job) -> list[Stage]:
    """A teacher over two epochs, then the duel over three; steps per epoch, cycle and checkpoint share no factor."""

    def stream() -> Stream:
        return Stream(Pictures(), BATCH, workers=job.workers)

    def net(seed: int) -> nn.Module:
        return built(seed, lambda: TinyNet(norm="batch", dropout=0.2))

    student, critic = net(job.weights + 1), built(job.weights + 2, lambda: nn.Linear(CLASSES, 1))
    optim = {"student": Optim(lr=1e-2, schedule="cosine", warmup=3), "critic": Optim("momentum", lr=0.1)}
    return [
        Stage(Taught(net(job.weights), stream()), TEACHER_STEPS, {"student": Optim(lr=1e-2)}, name="teacher"),
        Stage(lambda made: Duel(student, critic, made, stream()), STUDENT_STEPS, optim, name="duel"),
    ]


def duel(job: Job) -> int:
    """Train the two stages as the command line would: exit codes and messages are those of `cli.main`."""
    from visiondistill import cli

    def play(words: list[str]) -> int:
        run = Run(output_dir=job.folder, **main_settings() | job.settings)
        watch = (lambda product, step: reached("look") or {}) if run.evaluate_every else None
        result = train(duel_stages(job), run, config="a: recipe\n", watch=watch)
        print(f"{result.reason} after step {result.step}")
        return 0 if result.reason == "finished" else 128 + signal.Signals[result.reason]

    with mock.patch.object(cli, "train", play):
        return cli.main(["train"])


def deaf(job: Job) -> int:
    """`duel`, but the first signal is forgotten: the run goes on with what the signal left alive."""
    once = []

    def handle(self: Signals, number: int, frame: Any) -> None:
        if once:
            self.received = number
        once.append(number)

    with mock.patch.object(Signals, "_handle", handle):
        return duel(job)


def soak(job: Job) -> int:
    """One long stage with everything on, sampled at each tenth; in memory unless there are workers."""
    steps = job.settings["steps"]
    columns = {
        name: torch.stack([torch.as_tensor(Pictures()[i][name]) for i in range(ROWS)]) for name in ("image", "label")
    }
    data = Pictures() if job.workers else TensorData(columns)
    method = Taught(built(0, lambda: TinyNet(norm="batch", dropout=0.2)), Stream(data, BATCH, workers=job.workers))
    samples = []

    def watch(product: nn.Module, step: int) -> dict[str, float]:
        samples.append(resources())
        return {}

    every = {"evaluate_every": steps // 10, "checkpoint_every": steps // 20, "log_every": 50}
    run = Run(output_dir=job.folder, **main_settings() | every)
    train([Stage(method, steps, {"student": Optim(lr=1e-3, schedule="cosine")})], run, watch=watch)
    _beside(job, "soak").write_text(json.dumps(samples))
    return 0


def resources() -> dict[str, int]:
    """Resident KiB, open files and threads of this process."""
    own = Path("/proc/self")
    pages = int((own / "statm").read_text().split()[1])
    return {
        "resident": pages * resource.getpagesize() // 1024,
        "files": len(list((own / "fd").iterdir())),
        "threads": len(list((own / "task").iterdir())),
    }


def command(job: Job) -> int:
    """The command line itself."""
    from visiondistill.cli import main

    return main(job.words)


class NearestMean(nn.Linear):
    """A teacher of digits that needs no training: the nearest class mean, as a linear layer on flat pixels."""

    def __init__(self) -> None:
        from visiondistill.data import Digits

        super().__init__(64, 10)
        rows = Digits("train").columns
        pixels, label = rows["image"].flatten(1).float(), rows["label"]
        means = torch.stack([pixels[label == digit].mean(0) for digit in range(10)])
        with torch.no_grad():
            self.weight.copy_(means)
            self.bias.copy_(-0.5 * means.square().sum(1))
        self.num_classes = 10

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1).float())


_acts: dict[tuple[str, int], str] = {}
_seen: Counter[str] = Counter()
_trace: list[str] = []


def reached(phase: str) -> None:
    """Do what the test wants done here."""
    _seen[phase] += 1
    _trace.append(phase)
    do = _acts.get((phase, _seen[phase]))
    if do is None:
        return
    verb, _, rest = do.partition(" ")
    if verb == "fill":
        _fill(Path(rest))
    elif verb == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest), resource.RLIM_INFINITY))
    elif verb == "raise":
        raise RuntimeError("a defect of this process alone")
    elif verb == "group":
        os.killpg(os.getpgrp(), signal.Signals[rest])
    elif verb == "twice":
        os.kill(os.getpid(), signal.Signals[rest])
        time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[rest])
    elif verb == "soon":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.Signals[rest])).start()
    else:
        os.kill(os.getpid(), signal.Signals[verb])


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**12))


class _Around:
    """A module with some functions replaced, for one other module to see."""

    def __init__(self, module: Any, **replaced: Callable) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _announced(function: Callable, before: str | None = None, after: str | None = None) -> Callable:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before:
            reached(before)
        result = function(*arguments, **options)
        if after:
            reached(after)
        return result

    return wrapped


def _half_written(save_file: Callable) -> Callable:
    """A kill in the phase "save.half" finds half of the file on the disk."""

    def wrapped(tensors: Any, path: Path) -> None:
        reached("save.tensors")
        save_file(tensors, path)
        if ("save.half", _seen["save.half"] + 1) in _acts:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
        reached("save.half")

    return wrapped


def install_hooks() -> None:
    """For the life of this process."""

    def replace(source: Path, target: Path) -> None:
        kind = "save" if Path(source).is_dir() else "text"
        reached(f"{kind}.replace")
        os.replace(source, target)
        reached(f"{kind}.named")

    files = _Around(os, replace=replace)
    trees = _Around(state.shutil, rmtree=_announced(state.shutil.rmtree, "save.delete"))
    for target, name, hooked in [
        (state, "save_file", _half_written(state.save_file)),
        (state, "_flush", _announced(state._flush, "save.flush")),
        (state, "os", files),
        (state, "shutil", trees),
        (state, "save", _announced(state.save, "save.begin", "save.end")),
        (Store, "save", _announced(Store.save, after="save.over")),
        (Step, "__call__", _announced(Step.__call__, "step", "stepped")),
        (loop._Session, "play", _announced(loop._Session.play, "built", "trained")),
    ]:
        mock.patch.object(target, name, hooked).start()
    torch._dynamo.register_backend(partial(_announced_compiler, None), name="announced")
    torch._dynamo.register_backend(partial(_announced_compiler, "inductor"), name="announced_inductor")


def _announced_compiler(backend: str | None, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    reached("compile")
    return module.forward if backend is None else torch._dynamo.lookup_backend(backend)(module, inputs)


def install_command_hooks() -> None:
    from visiondistill import classifiers, exported, preflight
    from visiondistill.eval import plots
    from visiondistill.export import bundle

    def delete(folder: Path, **options: Any) -> None:
        facts = Path(folder) / exported.FACTS
        if facts.exists():
            facts.unlink()
            reached("export.half deleted")
        rmtree(folder, **options)

    for name in ("draw_confusion", "draw_reliability"):
        mock.patch.object(plots, name).start()
    rmtree = exported.shutil.rmtree
    mock.patch.object(exported, "shutil", _Around(exported.shutil, rmtree=delete)).start()
    for target, name, before, after in [
        (preflight, "_measure_teacher", "preflight", None),
        (classifiers, "accuracy_report", "evaluation", None),
        (bundle, "_describe", "export", None),
    ]:
        mock.patch.object(target, name, _announced(getattr(target, name), before, after)).start()


def _play(job: Job) -> int:
    _acts.update({(act.phase, act.nth): act.do for act in job.acts})
    if job.size > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port, "WORLD_SIZE": job.size}
        os.environ.update({name: str(value) for name, value in where.items()})
        os.environ.update({"RANK": str(job.rank), "LOCAL_RANK": str(job.rank)})
    install_hooks()
    if job.kind == "command":
        install_command_hooks()
    code = globals()[job.kind](job)
    _beside(job, "phases").write_text("\n".join(_trace))
    return code


def _fork(entry: dict[str, Any]) -> int:
    """The child's pid; the child itself ends the interpreter as any run does."""
    job = Job(**entry | {"acts": tuple(Act(**act) for act in entry["acts"])})
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(_beside(job, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, target)
    sys.exit(_play(job))


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _requests() -> Iterable[dict[str, Any]]:
    buffered = b""
    while True:
        select.select([0], [], [])
        chunk = os.read(0, 2**16)
        if not chunk:
            return
        *lines, buffered = (buffered + chunk).split(b"\n")
        yield from map(json.loads, lines)


def serve() -> None:
    """Fork and wait, as asked on the standard input, until that closes."""
    alive: set[int] = set()
    reply = partial(print, flush=True)
    for request in _requests():
        if "start" in request:
            pid = _fork(request["start"])
            alive.add(pid)
            reply(json.dumps({"pid": pid}))
        else:
            reply(json.dumps({"code": _wait(request["wait"], request["timeout"])}))
            alive.discard(request["wait"])
    for pid in alive:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    # Once for all runs: what a run imports on its way.
    import jsonargparse  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import timm.optim
    import timm.scheduler  # noqa: F401
    import torch._dynamo
    import torch.export

    from visiondistill import workbench  # noqa: F401

    # Recipes name classes of this module; they must find these, not a second copy.
    sys.modules["processes"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    # A collection in a child would copy every page that it shares with this process.
    gc.collect()
    gc.freeze()
    serve()
