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


@dataclass(frozen=True)
class Case:
    """One size: `width` of the hidden layers, rows, timed steps, and whether a second turn plays."""

    name: str
    width: int
    batch_size: int
    steps: int
    two_turns: bool
    bound: float


CASES = (
    Case("one turn", width=64, batch_size=64, steps=600, two_turns=False, bound=1.20),
    Case("two turns", width=64, batch_size=64, steps=600, two_turns=True, bound=1.20),
    Case("compute-bound", width=2048, batch_size=256, steps=12, two_turns=False, bound=1.02),
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


def _engine_seconds_per_step(case: Case, data: TensorData, folder: Path) -> float:
    warm_up = max(20, case.steps // 4)
    run = Run(
        output_dir=str(folder),
        batch_size=case.batch_size,
        log_every=case.steps,
        checkpoint_every=10**9,
        proof_window=0,
        progress=False,
        device="cpu" if data.device.type == "cpu" else "cuda",
    )
    method = _Clocked(case, Stream(data, case.batch_size), warm_up)
    train([Stage(method, warm_up + case.steps, {"default": Optim(lr=1e-3)})], run)
    return method.seconds / case.steps


class _Clocked(MlpDistillation):
    """Reads the clock when step `start` is prepared, and once more when the run hands over."""

    def __init__(self, case: Case, stream: Stream, start: int) -> None:
        super().__init__(case, stream)
        self.clock = (start, start + case.steps - 1)
        self.seconds = 0.0

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        if draw.step in self.clock:
            self.seconds = perf_counter() - self.seconds
        return super().prepare(batch, draw, due)


def measure(case: Case, repeats: int) -> tuple[float, float, list[float]]:
    """Median seconds per step of the bare loop and of the engine, and the ratio of each pair."""
    torch.manual_seed(0)
    features = torch.randn(4096, FEATURES)
    data = TensorData({"features": features, "label": (features[:, :CLASSES]).argmax(1)})
    bare = Bare(case, data)
    bare.seconds_per_step(max(20, case.steps // 4))
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            by_hand = bare.seconds_per_step(case.steps)
            pairs.append((by_hand, _engine_seconds_per_step(case, data, Path(folder) / str(repeat))))
    return (
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        [engine / by_hand for by_hand, engine in pairs],
    )


def benchmark_step(repeats: int = 7, cases: Sequence[Case] = CASES) -> dict[str, float]:
    """Measure every case and print a table; returns the median ratios by case."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"one step, engine over hand-written loop ({torch.get_num_threads()} threads, {repeats} pairs)")
    for column in ("case", "hand-written", "engine", "ratio (median)", "spread", "bound"):
        table.add_column(column, justify="left" if column == "case" else "right")
    medians = {}
    for case in cases:
        by_hand, engine, ratios = measure(case, repeats)
        medians[case.name] = statistics.median(ratios)
        spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
        table.add_row(
            case.name,
            f"{by_hand * 1e6:.0f} us",
            f"{engine * 1e6:.0f} us",
            f"{medians[case.name]:.3f}",
            spread,
            f"{case.bound:.2f}",
        )
    Console().print(table)
    return medians
