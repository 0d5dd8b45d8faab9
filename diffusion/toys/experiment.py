"""The ring from end to end: regress a network on the exact denoiser, distil the exact one into it, measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.losses import denoising_loss, edm_loss_weight
from diffusion.methods.base import GeneratorMethod, trainable_copy
from diffusion.methods.dmd2 import DMD2
from diffusion.process import TimeLaw
from diffusion.samplers import heun, renoise
from diffusion.toys.metrics import ring_metrics
from diffusion.toys.mixture import GaussianMixture, exact_denoiser, ring
from diffusion.toys.network import toy_denoiser
from diffusion.toys.picture import draw_ring
from visiondistill import recipes
from visiondistill.engine import Batch, Carry, Draw, Result, Terms, Turn

RECIPE = "smoke/dmd2"
SAMPLES = 8000
REFERENCE = 4000
HEUN_STEPS = 40

Metrics = dict[str, dict[str, float]]


class RingRegression(GeneratorMethod):
    """Regress a small denoiser on the ring's exact posterior mean, at noised samples of the ring.

    Student and critic start from it, as they start from copies of the teacher in image models.

    Args:
        width, depth: of the network.
        times: law of the noise levels; default the EDM path's own, all of it.
        sigma_data: of EDM's weight, which makes all noise levels count alike.
    """

    def __init__(self, width: int = 128, depth: int = 3, times: TimeLaw | None = None, sigma_data: float = 0.5) -> None:
        denoiser = toy_denoiser(width, depth)
        exact = exact_denoiser(ring(), denoiser.process)
        super().__init__(Generator(denoiser, (2,)), players={"denoiser": denoiser}, frozen={"exact": exact})
        self.sigma_data = sigma_data
        self.times = times or self.process.time_law()

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("regression", self.regression_loss, moves=("denoiser",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        mixture = self.frozen["exact"].network.mixture
        x0 = mixture.sample(draw.uniform("data/component"), draw.normal("data/noise", 2))
        t = self.times(draw.uniform("time"))
        x_t = self.process.add_noise(x0, draw.normal("noise", 2), t)
        return batch | {"x_t": x_t, "t": t, "target": self.frozen["exact"](x_t, t).x0}

    def regression_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        prediction = self.players["denoiser"](batch["x_t"], batch["t"])
        weight = edm_loss_weight(batch["t"], self.sigma_data)
        return {"error": denoising_loss(prediction.x0, batch["target"], weight=weight)}, {}


class RingDMD2(DMD2):
    """DMD2 with the ring's exact denoiser as teacher; nothing but the distillation can then be wrong.

    Args:
        initial: the generator that student and critic start from.
        student_every: as of `DMD2`.
    """

    def __init__(self, initial: Generator, student_every: int = 5) -> None:
        super().__init__(
            Generator(exact_denoiser(ring(), initial.process), (2,)),
            student=Generator(trainable_copy(initial.denoiser), (2,)),
            fake_score=trainable_copy(initial.denoiser),
            student_every=student_every,
        )


def run_ring(seed: int = 0, output_dir: str | Path = "runs/ring", changes: Mapping[str, Any] | None = None) -> Metrics:
    """Run the recipe `smoke/dmd2` (a regression, then a one-step student by `DMD2`); measure teacher and student.

    Args:
        seed: of initial weights, training and evaluation.
        output_dir: the run folder; gets what `report_ring` writes, too.
        changes: dotted keys of the recipe to override, such as `{"stages.dmd2.steps": 500}`.

    Returns:
        {"true": ..., "teacher": ..., "student": ...}, each as `ring_metrics` gives it; "true" are
        fresh true samples, the floor.
    """
    settings = {"run.seed": seed, "run.output_dir": str(output_dir), "run.progress": False}
    config = recipes.override(recipes.load(RECIPE), settings | dict(changes or {}))
    return report_ring(recipes.run(config), seed)


@torch.no_grad()
def report_ring(result: Result, seed: int = 0) -> Metrics:
    """Metrics of teacher, student and true samples; writes ring.json and ring.png to the run folder.

    The teacher samples with 40 steps of Heun, the student (averaged weights, where there are any)
    with its own few, both from the same noise.
    """
    teacher, student = result.method.teacher.denoiser, (result.ema or result.product).denoiser
    mixture, generator = ring(), torch.Generator().manual_seed(seed)
    noise = torch.randn(SAMPLES, 2, generator=generator)
    steps = len(result.method.times) - 1
    sets = {
        "true": _true_samples(mixture, SAMPLES, generator),
        "teacher": sample_teacher(teacher, noise),
        "student": sample_student(student, noise, steps, generator),
    }
    reference = _true_samples(mixture, REFERENCE, generator)
    metrics = {name: ring_metrics(samples, mixture, reference) for name, samples in sets.items()}
    folder = Path(result.output_dir)
    (folder / "ring.json").write_text(json.dumps(metrics, indent=2) + "\n")
    titles = {
        "true": "Data",
        "teacher": f"Teacher, {2 * HEUN_STEPS - 1} passes",
        "student": f"Student, {steps} pass{'es' if steps > 1 else ''}",
    }
    panels = {titles[name]: (samples, _caption(metrics[name])) for name, samples in sets.items()}
    draw_ring(panels, mixture, folder / "ring.png")
    return metrics


def sample_teacher(teacher: Denoiser, noise: Tensor) -> Tensor:
    """Heun's method on the probability flow, from unit noise `[B, ...]`."""
    process = teacher.process

    def model(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t).x0

    return heun(model, process.start(noise), process.timesteps(HEUN_STEPS), process, prediction_type="x0")


def sample_student(
    student: Denoiser, noise: Tensor, steps: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Sample as the student was trained: at its own times, with fresh noise between them."""
    process = student.process
    times = process.student_times(steps)
    noises = [torch.randn(noise.shape, generator=generator, dtype=noise.dtype) for _ in range(steps - 1)]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t).x0

    return renoise(model, process.start(noise, times[0]), times, process, noises=noises)


def _true_samples(mixture: GaussianMixture, count: int, generator: torch.Generator) -> Tensor:
    return mixture.sample(torch.rand(count, generator=generator), torch.randn(count, 2, generator=generator))


def _caption(metrics: dict[str, float]) -> str:
    return (
        f"{metrics['modes']} of 8 modes, {metrics['on_mode']:.0%} of samples on one\n"
        f"energy distance {metrics['energy_distance'] * 1e4:.1f}e-4 (equal: 0)"
    )
