"""Is a teacher read as it was trained? It denoises images, and what it says is read as every prediction type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from diffusion.conditions import Conditions
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.process import KINDS, Process, VPProcess
from diffusion.samplers import ddim
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch
from visiondistill.engine.rng import key
from visiondistill.eval import evaluating

LEVELS = (0.5, 1.0, 2.0)
"""Noise over signal at which a teacher is asked."""

CLEAR = 0.7
"""Share of the trivial predictor's error below which a reading of the teacher is plainly right."""

FAR = 2.0
"""Times the right reading's error: what says eps, read as v, can still beat the trivial predictor."""

TABLES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": ()}
"""Tables of noise levels that diffusers' models are trained on: first and last beta by `beta_schedule`."""

TABLE_ROWS = 16
"""Images that are asked again for each other table."""

BETTER, WORTH = 1.3, 0.05
"""Factor and difference of errors from which on another table is spoken of."""

SAMPLING = (20.0, 9.3, 4.3, 2.0, 0.93, 0.43, 0.2, 0.1)
"""Noise over signal along the way to a teacher's own samples."""

OWN_ROWS, OWN_NUMBERS = 8, 2048
"""Own samples: so many, or as many as have so many numbers together."""

LEAST_VARIANCE = 1e-3
"""Among own samples: where all are alike, to know one is to know them all, and that needs no training."""


@dataclass(frozen=True)
class Reading:
    """How well a teacher denoises, by what its output is taken for.

    Attributes:
        errors: mean squared error of x0 over that of the best affine predictor, by prediction type;
            geometric mean over `LEVELS`.
        declared: what the teacher says that it predicts.
        images: how many were noised.
        noised: what these are, in words.
        table: of the first `TABLE_ROWS`, the error as declared; mean over `LEVELS`.
        tables: the same with other tables of noise levels, by `beta_schedule`.
    """

    errors: dict[str, float]
    declared: str
    images: int
    noised: str = "validation images"
    table: float = 0.0
    tables: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str:
        return min(self.errors, key=self.errors.__getitem__)

    def check(self) -> str:
        """A line for people.

        Raises:
            SettingsError: as another type or by another table it is plainly right, as declared worse than trivial or
                far worse than so.
        """
        error, best = self.errors[self.declared], self.best
        if _plainly(self.errors[best], error):
            raise SettingsError(
                f"teacher: read as {self.declared!r}, its error on {self.images} {self.noised} is {error:.2f} of the "
                f"trivial predictor's; read as {best!r} it is {self.errors[best]:.2f}: its prediction type is {best!r}"
            )
        line = f"teacher measured: {error:.2f} of the trivial predictor's error on {self.images} {self.noised}"
        if error >= 1:
            line += ": it is not trained, or its noise levels or the range of its pixels are others than given"
        return line + self._of_tables()

    def _of_tables(self) -> str:
        """What is to be said of the noise levels; mostly nothing."""
        name = min(self.tables, key=self.tables.__getitem__, default="")
        if not name or self.table < max(BETTER * self.tables[name], self.tables[name] + WORTH):
            return ""
        betas = ", ".join(f"{end} {beta}" for end, beta in zip(("beta_start", "beta_end"), TABLES[name], strict=False))
        said = (
            f"by its table of noise levels its error is {self.table:.2f} of the trivial predictor's, by diffusers' "
            f"{name!r}{betas and f' ({betas})'} it is {self.tables[name]:.2f}"
        )
        if _plainly(self.tables[name], self.table):
            raise SettingsError(f"teacher: {said}: give it the beta_schedule and the betas that it was trained with")
        return f"; {said}: was it trained with its own?"


def _plainly(best: float, declared: float) -> bool:
    """Whether the best reading is right, and the declared one is not."""
    return best < CLEAR and declared >= min(1.0, FAR * best)


def read_batch(generator: Generator, batch: Batch, noised: str) -> Reading:
    """`read` for a batch of data: its codes where it holds some, and its conditions where it says them.

    Where it does not, all images are denoised with the null condition, or the first one if there is none.
    """
    held = batch["code" if "code" in batch else "image"]
    condition = _condition_of(generator.conditions, batch, held)
    return (_read_codes if "code" in batch else read)(generator, held, condition, noised)


@torch.no_grad()
def read(generator: Generator, images: Tensor, condition: Any = None, noised: str = "validation images") -> Reading:
    """Noise images `[B, C, H, W]` in [0, 1], let the generator's network denoise them, and compare.

    The trivial predictor is the affine function of x_t with the least error, given mean and variance
    over all pixels; a network that knows images is far better at any noise level.

    Costs a pass over all of them at each of `LEVELS`, and over `TABLE_ROWS` for every other table.

    Args:
        noised: the images in words.
    """
    with evaluating(generator):
        return _read_codes(generator, generator.codec.encode(images), condition, noised)


@torch.no_grad()
def read_own(generator: Generator) -> Reading | None:
    """The same without images: on the teacher's own samples of a few steps, made as it is declared.

    If that is wrong they are no images, yet mostly near enough to some for the right reading to denoise them far
    better than the affine predictor and the declared one; if not, they are made by the other types in turn. All
    have one condition, and the trivial predictor knows their mean pixel by pixel: else a network that answers
    whatever it is asked with one pattern would be taken for one that knows it. Tables of noise levels are not
    compared: such samples are smoother than images, which looks like another level.

    Costs a pass over `OWN_ROWS` samples for each of `SAMPLING` and of `LEVELS`; where they do not confirm the
    declared type, as much again for every other.

    Returns:
        None where nothing tells: of no prediction type come samples that the network then denoises.
    """
    noise, declared, condition = _own_noise(generator), generator.denoiser.prediction_type, None
    if generator.conditions is not None:
        condition = _unspecific(generator.conditions, len(noise), noise.device)
    with evaluating(generator):
        for kind in sorted(_kinds(generator.denoiser), key=lambda kind: kind != declared):
            x0 = _sampled(generator, kind, noise, condition)
            variance = float(x0.double().var(0).mean())
            # Also false of samples that are not finite.
            if not LEAST_VARIANCE <= variance < math.inf:
                continue
            errors = _joined(_Probe(generator.denoiser, x0, condition, variance).shares())
            if min(errors.values()) < CLEAR:
                return Reading(errors, declared, len(x0), "samples of its own")
    return None


@torch.no_grad()
def _read_codes(generator: Generator, codes: Tensor, condition: Any, noised: str) -> Reading:
    denoiser = generator.denoiser
    with evaluating(generator):
        probe = _Probe(denoiser, codes, condition, float(codes.double().var(correction=0)))
        shares, few, kind = probe.shares(), probe.first(TABLE_ROWS), denoiser.prediction_type
        # Not joined as the types' errors are: of the arithmetic mean the right levels have the least.
        tables = {
            name: float(few.shares(table, [kind])[kind].mean())
            for name, table in _other_tables(generator.process).items()
        }
        table = float(shares[kind][:, :TABLE_ROWS].mean())
        return Reading(_joined(shares), kind, len(codes), noised, table, tables)


class _Probe:
    """Codes `[B, ...]` and noise for a network to denoise; `variance` is what the affine predictor knows."""

    def __init__(self, denoiser: Denoiser, x0: Tensor, condition: Any, variance: float) -> None:
        self.denoiser, self.x0, self.condition, self.variance = denoiser, x0, condition, variance
        self.noise = _noise(x0.shape, "preflight").to(x0)

    def first(self, rows: int) -> _Probe:
        """With the same noise."""
        condition = None if self.condition is None else tree_map(lambda held: held[:rows], self.condition)
        few = _Probe(self.denoiser, self.x0[:rows], condition, self.variance)
        few.noise = self.noise[:rows]
        return few

    def shares(self, process: Process | None = None, kinds: Sequence[str] = ()) -> dict[str, Tensor]:
        """Squared errors of x0 over the affine predictor's, `[len(LEVELS), B]` by what the output is taken for.

        Args:
            process: says how much noise there is at the times that the network is given; default its own.
            kinds: default all.
        """
        process, kinds = process or self.denoiser.process, kinds or _kinds(self.denoiser)
        found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        for level in LEVELS:
            t = _time(process, level)
            x_t = process.add_noise(self.x0, self.noise, t)
            said = self.denoiser(x_t, t.to(x_t.device), self.condition).value
            trivial = _affine_error(self.variance, float(process.alpha(t)), float(process.sigma(t)))
            for kind in kinds:
                error = (process.convert(said, x_t, t, kind, "x0") - self.x0).double().square()
                found[kind].append(error.flatten(1).mean(1) / trivial)
        return {kind: torch.stack(levels) for kind, levels in found.items()}


def _joined(shares: Mapping[str, Tensor]) -> dict[str, float]:
    """Geometric means over the levels."""
    return {kind: float(each.mean(1).clamp(min=1e-12).log().mean().exp()) for kind, each in shares.items()}


def _condition_of(conditions: Conditions | None, batch: Batch, held: Tensor) -> Any:
    if conditions is None:
        return None
    try:
        return conditions.of(batch)[0]
    except ValueError:
        return _unspecific(conditions, len(held), held.device)


def _unspecific(conditions: Conditions, rows: int, device: torch.device) -> Any:
    """The null condition for every row; where there is none, the first condition."""
    condition, null = conditions.at([0] * rows, device)
    return condition if null is None else null


def _affine_error(variance: float, alpha: float, sigma: float) -> float:
    return max(variance * sigma**2 / (alpha**2 * variance + sigma**2), 1e-12)


def _kinds(denoiser: Denoiser) -> list[str]:
    """Types that the path has; a score is eps by another scale, and asked for where it is declared alone."""
    known = [kind for kind in KINDS if not (kind == "velocity" and isinstance(denoiser.process, VPProcess))]
    return [kind for kind in known if kind != "score" or kind == denoiser.prediction_type]


def _time(process: Process, level: float) -> Tensor:
    """At which noise over signal is `level`, as near as the path comes to it."""
    t = process.time_at(-math.log(level))
    return t.round().long() if isinstance(process, VPProcess) else t.clamp(process.min_t, process.max_t)


def _other_tables(process: Process) -> dict[str, VPProcess]:
    """Those of `TABLES` with the process's number of steps that differ from its own and reach all `LEVELS`."""
    if not isinstance(process, VPProcess):
        return {}
    own = process.alphas_cumprod
    named = {name: VPProcess.from_betas(name, *betas, num_timesteps=len(own)) for name, betas in TABLES.items()}
    if not all(_reaches(table) for table in (process, *named.values())):
        return {}
    return {name: table for name, table in named.items() if not torch.allclose(table.alphas_cumprod, own, rtol=1e-3)}


def _reaches(table: VPProcess) -> bool:
    first, last = (float(table.half_log_snr(t)) for t in (0, table.max_t))
    return first >= -math.log(min(LEVELS)) and last <= -math.log(max(LEVELS))


def _noise(shape: Sequence[int], tag: str) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(key(tag)))


def _own_noise(generator: Generator) -> Tensor:
    device = next((held.device for held in chain(generator.parameters(), generator.buffers())), torch.device("cpu"))
    rows = max(OWN_ROWS, math.ceil(OWN_NUMBERS / math.prod(generator.shape)))
    return _noise((rows, *generator.shape), "preflight/own").to(device)


def _sampled(generator: Generator, kind: str, noise: Tensor, condition: Any) -> Tensor:
    """Codes like `noise`, from a network that is taken to predict `kind`."""
    process = generator.process
    end = -1 if isinstance(process, VPProcess) else 0
    times = torch.stack([_time(process, level) for level in SAMPLING]).unique_consecutive()
    times = torch.cat([times, times.new_tensor([end])])

    def model(x: Tensor, t: Tensor) -> Tensor:
        return generator.denoiser(x, t, condition).value

    return ddim(model, process.start(noise, times[0]), times, process, prediction_type=kind)
