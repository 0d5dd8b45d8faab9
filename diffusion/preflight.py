"""Is a teacher read as it was trained? It denoises real images, and what it says is read as every prediction type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.generator import Generator
from diffusion.process import KINDS, VPProcess
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import key
from visiondistill.eval import evaluating

LEVELS = (0.5, 1.0, 2.0)
"""Noise over signal at which a teacher is asked."""

CLEAR = 0.7
"""Share of the trivial predictor's error below which a reading of the teacher is plainly right."""

FAR = 2.0
"""Times the right reading's error: what says eps, read as v, can still beat the trivial predictor."""


@dataclass(frozen=True)
class Reading:
    """How well a teacher denoises, by what its output is taken for.

    Attributes:
        errors: mean squared error of x0 over that of the best affine predictor, by prediction type;
            geometric mean over `LEVELS`.
        declared: what the teacher says that it predicts.
        images: how many were noised.
    """

    errors: dict[str, float]
    declared: str
    images: int

    @property
    def best(self) -> str:
        return min(self.errors, key=self.errors.__getitem__)

    def check(self) -> str:
        """A line for people.

        Raises:
            SettingsError: as another type it is plainly right, as declared worse than trivial or far worse than so.
        """
        error, best = self.errors[self.declared], self.best
        if self.errors[best] < CLEAR and error >= min(1.0, FAR * self.errors[best]):
            raise SettingsError(
                f"teacher: read as {self.declared!r}, its error on {self.images} real images is {error:.2f} of the "
                f"trivial predictor's; read as {best!r} it is {self.errors[best]:.2f}: its prediction type is {best!r}"
            )
        line = f"teacher measured: {error:.2f} of the trivial predictor's error on {self.images} validation images"
        if error < 1:
            return line
        return f"{line}: it is not trained, or its noise levels or the range of its pixels are others than given"


@torch.no_grad()
def read(generator: Generator, images: Tensor, condition: object = None) -> Reading:
    """Noise images `[B, C, H, W]` in [0, 1], let the generator's network denoise them, and compare.

    The trivial predictor is the affine function of x_t with the least error, given mean and variance
    over all pixels; a network that knows images is far better at any noise level.
    """
    denoiser, process = generator.denoiser, generator.process
    kinds = [kind for kind in KINDS if kind != "score" and not (kind == "velocity" and isinstance(process, VPProcess))]
    with evaluating(generator):
        x0 = generator.codec.encode(images)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(key("preflight"))).to(x0)
        logs = dict.fromkeys(kinds, 0.0)
        for level in LEVELS:
            t = process.time_at(-math.log(level))
            t = t.round().long() if isinstance(process, VPProcess) else t
            x_t = process.add_noise(x0, noise, t)
            said = denoiser(x_t, t.to(x0.device), condition).value
            trivial = _affine_error(x0, float(process.alpha(t)), float(process.sigma(t)))
            for kind in kinds:
                guess = process.convert(said, x_t, t, kind, "x0")
                error = (guess - x0).square().mean(dtype=torch.float64)
                logs[kind] += math.log(max(float(error), 1e-12) / trivial) / len(LEVELS)
    return Reading({kind: math.exp(log) for kind, log in logs.items()}, denoiser.prediction_type, len(images))


def _affine_error(x0: Tensor, alpha: float, sigma: float) -> float:
    variance = float(x0.double().var(correction=0))
    return max(variance * sigma**2 / (alpha**2 * variance + sigma**2), 1e-12)
