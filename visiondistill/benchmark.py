"""The engine's loop against a hand-written loop that does the same work, in one process, interleaved.

The hand-written loops are what a careful practitioner types: batches from memory, teacher under
`no_grad`, fused AdamW. They have no guard, no noise by step, no metrics and no checkpoints.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiondistill.data import Stream, TensorData
from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Run, Stage, Terms, Turn, train

CLASSES, FEATURES = 10, 64
WARM_UP = 3
"""Chunks that are not counted."""
LONG = 100_000
"""Steps of a run in which what compiling costs once counts little."""


@dataclass(frozen=True)
class Case:
    """One size: `width` of the hidden layers, rows, steps in a chunk, and whether a second turn plays."""

    name: str
    width: int
    batch_size: int
    chunk: int
    two_turns: bool
    bound: float


CASES = (
    Case("one turn", width=64, batch_size=64, chunk=20, two_turns=False, bound=1.20),
    Case("two turns", width=64, batch_size=64, chunk=20, two_turns=True, bound=1.20),
    Case("compute-bound", width=1024, batch_size=1024, chunk=1, two_turns=False, bound=1.02),
)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


class MlpDistillation(Method):
    """Cross-entropy and KL on an MLP; with `two_turns` a second student learns in a turn of its own."""

    def __init__(self, case: Case, stream: Stream) -> None:
        players = {"student": mlp(case.width)} | ({"second": mlp(case.width)} if case.two_turns else {})
        super().__init__(players, {"teacher": mlp(case.width)}, {"train": stream})
        self.case = case

    def turns(self) -> tuple[Turn, ...]:
        losses: dict[str, Callable[[Batch], tuple[Terms, Carry]]] = {"student": self.student, "second": self.second}
        return tuple(Turn(name, losses[name], moves=(name,)) for name in self.players)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        batch["teacher_logits"] = self.frozen["teacher"](batch["train"]["features"])
        return batch

    def student(self, batch: Batch) -> tuple[Terms, Carry]:
        return _terms(self.players["student"], batch), {}

    def second(self, batch: Batch) -> tuple[Terms, Carry]:
        return _terms(self.players["second"], batch), {}


def _terms(network: nn.Module, batch: Batch) -> Terms:
    ce, kl = _losses(network(batch["train"]["features"]), batch["teacher_logits"], batch["train"]["label"])
    return {"ce": ce, "kl": kl}


def _losses(logits: Tensor, teacher_logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    kl = F.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean")
    return F.cross_entropy(logits, label), kl


class Bare:
    """The hand-written loop."""

    def __init__(self, case: Case, data: TensorData) -> None:
        self.case, self.data, self.teacher = case, data, mlp(case.width).eval().requires_grad_(False)
        self.students = [mlp(case.width) for _ in range(1 + case.two_turns)]
        self.optimizers = [torch.optim.AdamW(s.parameters(), lr=1e-3, fused=True) for s in self.students]
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        columns, size = self.data.columns, self.case.batch_size
        while True:
            order = torch.randperm(len(self.data))
            for start in range(0, len(self.data) - size + 1, size):
                rows = order[start : start + size]
                yield columns["features"][rows], columns["label"][rows]

    def seconds_per_step(self, steps: int) -> float:
        started = perf_counter()
        for _ in range(steps):
            features, label = next(self.batches)
            with torch.no_grad():
                teacher_logits = self.teacher(features)
            for student, optimizer in zip(self.students, self.optimizers, strict=True):
                optimizer.zero_grad()
                ce, kl = _losses(student(features), teacher_logits, label)
                (ce + kl).backward()
                optimizer.step()
        return (perf_counter() - started) / steps


class _Interleaved(MlpDistillation):
    """Stops every `chunk` steps, before the batch is prepared, to time as many steps of the bare loop.

    The machine's moods then meet both loops alike. The engine's time runs from the end of one stop
    to the beginning of the next: whole steps with everything that belongs to them.
    """

    def __init__(self, case: Case, stream: Stream, bare: Bare) -> None:
        super().__init__(case, stream)
        self.bare, self.pairs, self._resumed = bare, [], 0.0

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        if draw.step % self.case.chunk == 0:
            engine = (perf_counter() - self._resumed) / self.case.chunk
            with torch.enable_grad():
                by_hand = self.bare.seconds_per_step(self.case.chunk)
            self.pairs.append((by_hand, engine))
            self._resumed = perf_counter()
        return super().prepare(batch, draw, due)


def measure(case: Case, pairs: int) -> list[tuple[float, float]]:
    """Seconds per step of the bare loop and of the engine, in `pairs` of chunks after a warm-up."""
    torch.manual_seed(0)
    features = torch.randn(4096, FEATURES)
    data = TensorData({"features": features, "label": features[:, :CLASSES].argmax(1)})
    method = _Interleaved(case, Stream(data, case.batch_size), Bare(case, data))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            output_dir=str(Path(folder) / "run"),
            batch_size=case.batch_size,
            checkpoint_every=10**9,
            proof_window=0,
            progress=False,
            device="cpu",
        )
        train([Stage(method, case.chunk * (pairs + WARM_UP) + 1, {"default": Optim(lr=1e-3)})], run)
    return method.pairs[WARM_UP:]


def benchmark_step(pairs: int = 60, cases: Sequence[Case] = CASES) -> dict[str, float]:
    """Measure every case and print a table; returns the median ratios by case."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"one step, engine over hand-written loop (median of {pairs} interleaved chunks, "
        f"{torch.get_num_threads()} threads)"
    )
    for column in ("case", "hand-written", "engine", "ratio", "quartiles", "bound"):
        table.add_column(column, justify="left" if column == "case" else "right")
    medians = {}
    for case in cases:
        found = measure(case, pairs)
        ratios = [engine / by_hand for by_hand, engine in found]
        low, medians[case.name], high = statistics.quantiles(ratios, n=4)
        by_hand, engine = (statistics.median(side) for side in zip(*found, strict=True))
        table.add_row(
            case.name,
            f"{by_hand * 1e6:.0f} us",
            f"{engine * 1e6:.0f} us",
            f"{medians[case.name]:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{case.bound:.2f}",
        )
    Console().print(table)
    return medians


def benchmark_performance(student: str, teacher: str, size: int, batch_size: int) -> list[str]:
    """Try the switches of `performance: auto` on KD of two timm models, over the length of a long run.

    Args:
        student, teacher: timm names; weights and images are random.
        size: height and width of the images.
        batch_size: images a step.

    Returns:
        The lines that are printed, see `engine.trial.fastest`.
    """
    from visiondistill import Distiller
    from visiondistill.engine.trial import fastest
    from visiondistill.models import Timm
    from visiondistill.terms import CE, KL

    torch.manual_seed(0)
    image = torch.randint(0, 256, (4 * batch_size, 3, size, size), dtype=torch.uint8)
    data = TensorData({"image": image, "label": torch.randint(CLASSES, (len(image),))})
    networks = [Timm(name, num_classes=CLASSES, input_size=(3, size, size)) for name in (student, teacher)]
    terms = {"ce": CE(), "kd": KL()}
    method = Distiller(networks[1], student=networks[0], terms=terms, streams={"train": Stream(data, batch_size)})
    run = Run("runs/benchmark", batch_size, progress=False)  # a trial writes nothing
    _, lines = fastest(Stage(method, LONG, {"default": Optim()}), run, LONG)
    print(f"{teacher} teaches {student}, {size} px, batch {batch_size}, {torch.get_num_threads()} threads")
    print("\n".join(lines))
    return lines
