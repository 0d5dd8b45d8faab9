"""What DMD2's steps cost in time, in passes of the teacher.

    python -m diffusion.mechanisms.turn_cost --device cuda --batch-size 64 --precision bf16 --compile

In arithmetic a step of the critic alone is four passes F of one network (its images 1, its own pass 1, back 2), a
step in which the student plays too is eight (its pass and back 3, both scores 2, then the critic's 3 on the same
images), and with the student in every fifth step the mean is 4.8 F. What a pass takes is measured in the same run,
under the same autocast. Every step is waited for, and the first ones are not counted; `steps a second` is of a
second run that nothing waits in.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffusion.generator import Generator
from diffusion.methods import DMD2
from diffusion.models import UNet2D
from visiondistill.engine import Optim, Run, Stage, train
from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw
from visiondistill.mechanisms.tables import markdown

EVERY = 5
"""Updates of the critic for one of the student."""
WARM_UP = 4 * EVERY
ARITHMETIC = {"critic": 4.0, "student and critic": 8.0, "mean": 4.8}


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256], help="widths of the UNet")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=100, help="that are counted")
    given = parser.parse_args()
    torch.manual_seed(0)
    teacher = UNet2D((3, given.size, given.size), 10, block_out_channels=tuple(given.channels)).to(given.device)
    run: dict[str, Any] = {
        "batch_size": given.batch_size,
        "device": given.device,
        "mixed_precision": given.precision,
        "channels_last": given.device != "cpu",
        "compile": given.compile,
    }
    found = waited(teacher, given.steps, run)
    found["pass of the teacher"] = one_pass(teacher, given.batch_size, given.precision)
    print(table(found))
    print(f"{steps_a_second(teacher, given.steps, run):.1f} steps a second, {given.batch_size} images each")


class Waited(DMD2):
    """Waits for the device before every step and looks at the clock; a step's seconds stand under its turns."""

    def __init__(self, teacher: Generator, **options: Any) -> None:
        super().__init__(teacher, **options)
        self.seconds: dict[frozenset[str], list[float]] = {}
        self._last: tuple[frozenset[str], float] | None = None

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        now = _now(self.teacher)
        if self._last is not None and draw.step > WARM_UP:
            kind, begun = self._last
            self.seconds.setdefault(kind, []).append(now - begun)
        self._last = due, now
        return super().prepare(batch, draw, due)


def waited(teacher: Generator, steps: int, run: dict[str, Any]) -> dict[str, float]:
    """Median seconds of both kinds of step, and their mean over a cycle."""
    method = Waited(teacher, student_every=EVERY)
    _play(method, steps + WARM_UP + 1, run)
    critic, both = (statistics.median(method.seconds[frozenset(kind)]) for kind in (("critic",), ("student", "critic")))
    return {"critic": critic, "student and critic": both, "mean": ((EVERY - 1) * critic + both) / EVERY}


def steps_a_second(teacher: Generator, steps: int, run: dict[str, Any]) -> float:
    """Of whole cycles, by the clock at their ends alone."""
    marks = []

    class Marked(DMD2):
        def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
            if draw.step in (WARM_UP, WARM_UP + steps):
                marks.append(_now(teacher))
            return super().prepare(batch, draw, due)

    _play(Marked(teacher, student_every=EVERY), WARM_UP + steps + 1, run)
    return steps / (marks[1] - marks[0])


@torch.no_grad()
def one_pass(teacher: Generator, rows: int, precision: str, times: int = 30) -> float:
    """Median seconds of the frozen network under autocast."""
    device = _device(teacher)
    x_t = torch.randn(rows, *teacher.shape, device=device)
    t = torch.full((rows,), 0.5 * (teacher.process.min_t + teacher.process.max_t), device=device)
    condition, _ = teacher.conditions.at(range(rows), device)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    seconds = []
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        for _ in range(times + 5):
            begun = _now(teacher)
            teacher.denoiser(x_t, t, condition)
            seconds.append(_now(teacher) - begun)
    return statistics.median(seconds[5:])


def table(found: dict[str, float]) -> str:
    """Milliseconds and passes, beside the arithmetic."""
    forward = found["pass of the teacher"]
    rows = [
        (name, f"{1e3 * seconds:.2f}", f"{seconds / forward:.2f}", f"{ARITHMETIC.get(name, 1.0):.1f}")
        for name, seconds in found.items()
    ]
    return markdown(("step", "ms", "passes", "in arithmetic"), rows)


def _play(method: DMD2, steps: int, run: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(
            str(Path(folder) / "run"), checkpoint_every=10**9, log_every=10**6, proof_window=0, progress=False, **run
        )
        train([Stage(method, steps, {"default": Optim(lr=1e-5)})], whole)


def _device(teacher: Generator) -> torch.device:
    return next(teacher.parameters()).device


def _now(teacher: Generator) -> float:
    if _device(teacher).type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


if __name__ == "__main__":
    main()
