"""Exact scores of Gaussians and mixtures as oracles: samplers, conversions, and what matching leads to.

`test_samplers.py` has the orders of convergence on Gaussians inside a path; here it is whole ways, from the first
time to the clean end, on the grids that processes give, and distributions with several modes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion.codecs import Pixels
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.methods.denoising import Denoising
from diffusion.methods.dmd2 import DMD2
from diffusion.process import (
    KINDS,
    ContinuousVPProcess,
    EDMProcess,
    FlowProcess,
    Process,
    TimeLaw,
    TrigProcess,
    VPProcess,
)
from diffusion.samplers import ddim, euler, heun
from diffusion.toys import GaussianMixture, energy_distance, exact_denoiser, toy_denoiser
from visiondistill.engine import Batch, Draw, Optim, Run, Stage, train

VP = VPProcess.from_betas("linear", 1e-4, 0.02)
PATHS = {"edm": EDMProcess(), "flow": FlowProcess(), "shifted": FlowProcess(shift=3.0), "trig": TrigProcess(0.5)}
PATHS |= {"vp": VP, "cosine": ContinuousVPProcess()}


def mixture() -> GaussianMixture:
    """Three modes of unequal weights, off the origin."""
    means = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.2, -0.9]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 0.2)


def true_samples(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return mixture().sample(u, torch.randn(count, 2, generator=generator, dtype=torch.float64))


def noise_of(count: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- samplers, the whole way


ON_PATHS = [(ddim, name, 1.0) for name in PATHS] + [
    (sampler, name, order)
    for sampler, order in ((euler, 1.0), (heun, 2.0))
    for name in ("edm", "flow", "shifted", "trig", "cosine")
]


@pytest.mark.parametrize(
    ("sampler", "name", "order"), ON_PATHS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_it_converges_at_its_order_on_a_mixture(sampler, name: str, order: float):
    """Richardson: with errors of order p the differences of successive refinements shrink by 2^p."""
    process = PATHS[name]
    teacher = exact_denoiser(mixture(), process)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t).x0

    first, last = 0.9 * process.max_t, 0.1 * process.max_t
    if name == "edm":
        first, last = 3.0, 0.1
    x = process.add_noise(true_samples(16), noise_of(16), first)
    ends = []
    for steps in (100, 200, 400):
        grid = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        ends.append(sampler(model, x, grid, process, prediction_type="x0"))
    coarse, fine = ((a - b).norm().item() for a, b in itertools.pairwise(ends))
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("name", PATHS)
def test_many_steps_on_its_own_grid_sample_the_mixture(name: str):
    process = PATHS[name]
    generator = Generator(exact_denoiser(mixture(), process), (2,), steps=100)
    samples = generator.sample(noise_of(1500))
    assert energy_distance(samples, true_samples(3000)) < 4e-3
    nearest = torch.cdist(samples, mixture().means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(samples)
    torch.testing.assert_close(shares, mixture().weights.float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [3, 7, 50])
def test_ddim_follows_its_stated_times(spacing: str, steps: int):
    """On a point mass every state lies on its own time's place of the line; diffusers steps by T//n instead."""
    grid = VP.timesteps(steps, spacing=spacing)
    x0, eps = torch.tensor([[0.7, -0.2]], dtype=torch.float64), torch.tensor([[0.3, 1.1]], dtype=torch.float64)
    asked: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return x0.expand_as(x)

    start = VP.add_noise(x0, eps, grid[0])
    _, path = ddim(model, start, grid, VP, prediction_type="x0", return_trajectory=True)
    assert asked == grid[:-1].tolist()
    for state, t in zip(path, grid, strict=True):
        torch.testing.assert_close(state, VP.add_noise(x0, eps, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("name", ["edm", "flow", "shifted", "trig", "cosine"])
def test_the_network_is_asked_at_the_stated_times_alone(sampler, name: str):
    process, asked = PATHS[name], []
    grid = process.timesteps(5)

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return torch.zeros_like(x)

    sampler(model, noise_of(2), grid, process, prediction_type="x0")
    assert set(asked) == set(grid[:-1].tolist())


# --- conversions at the ends


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("end", ["clean", "noise"])
def test_conversions_there_and_back_at_the_ends(name: str, end: str):
    process = PATHS[name]
    margin = 0 if name in ("edm", "vp") else 1e-3 * process.max_t
    t = process.min_t + margin if end == "clean" else process.max_t - margin
    if name == "vp":
        t = 0 if end == "clean" else 999
    x_t, p = noise_of(4), torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kinds = [kind for kind in KINDS if not (kind == "velocity" and name == "vp")]
    for source in kinds:
        for target in kinds:
            there = process.convert(p, x_t, t, source, target)
            back = process.convert(there, x_t, t, target, source)
            torch.testing.assert_close(back, p, rtol=1e-6, atol=1e-6, msg=f"{source} -> {target}")


# --- what matching leads to


class GaussianScore(nn.Module):
    """The exact posterior mean for data N(mean, std^2) along each axis; both can be learned."""

    def __init__(self, process: Process, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.process = process
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x: Tensor, t: Tensor, condition: None = None) -> Tensor:
        a, s, variance = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None], (2 * self.log_std).exp()
        return self.mean + a * variance / (a**2 * variance + s**2) * (x - a * self.mean)


class Affine(nn.Module):
    """mean + scale * unit noise: a student that can be any Gaussian along the axes."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: None = None) -> Tensor:
        return self.mean + self.scale * x / self.start


MEAN, STD = [0.8, -0.5], [0.3, 0.7]


def gaussian_dmd2(process: Process, fake_mean: list[float], fake_std: list[float], **options) -> DMD2:
    teacher = Generator(Denoiser(GaussianScore(process, MEAN, STD), process, "x0"), (2,))
    start = 1.0 if isinstance(process, VPProcess) else process.sigma(process.max_t).item()
    student = Generator(Denoiser(Affine(start), process, "x0"), (2,))
    fake = Denoiser(GaussianScore(process, fake_mean, fake_std), process, "x0")
    return DMD2(teacher, student=student, fake_score=fake, **options)


def field_on_the_mean(method: DMD2, rows: int = 256) -> Tensor:
    draw = Draw(0, 0, {"": (0, rows)}, rows, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        batch = method.prepare({}, draw, frozenset({"student"}))
    terms, _ = method.student_loss(batch)
    (gradient,) = torch.autograd.grad(terms["dmd"], method.players["student"].network.mean)
    return gradient


MATCHED = [PATHS["edm"], PATHS["flow"], PATHS["vp"]]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("process", MATCHED, ids=repr)
def test_the_students_gradient_is_zero_where_fake_and_real_agree_and_else_points_home(
    process: Process, normalize: bool
):
    assert (field_on_the_mean(gaussian_dmd2(process, MEAN, STD, normalize=normalize)) == 0).all()
    away = field_on_the_mean(gaussian_dmd2(process, [0.9, -0.8], STD, normalize=normalize))
    assert away[0] > 0
    assert away[1] < 0


def test_unnormalised_it_is_the_closed_form():
    """Equal variances: fake - real = s^2/(a^2 v + s^2) (m - mu), whatever the sample."""
    process = PATHS["flow"]
    method = gaussian_dmd2(process, [1.0, -0.5], STD, normalize=False, score_times=TimeLaw("uniform", 0.5, 0.5))
    expected = 0.25 / (0.25 * 0.09 + 0.25) * 0.2 / 2
    torch.testing.assert_close(field_on_the_mean(method), torch.tensor([expected, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "process", [PATHS["flow"], *(pytest.param(PATHS[n], marks=pytest.mark.slow) for n in ("edm", "vp"))], ids=repr
)
def test_a_student_of_a_gaussian_finds_its_mean_and_its_spread(process: Process, tmp_path: Path):
    method = gaussian_dmd2(process, [0.0, 0.0], [1.0, 1.0], sigma_data=None if process is VP else 0.5)
    rates = {"student": Optim("adam", lr=3e-2, schedule="cosine"), "fake_score": Optim("adam", lr=4e-2)}
    run = {"batch_size": 64, "noise_block": 64, "progress": False, "device": "cpu", "log_every": 500}
    train([Stage(method, 800, rates)], Run(str(tmp_path), **run))
    student = method.players["student"].network
    torch.testing.assert_close(student.mean.detach(), torch.tensor(MEAN).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(student.scale.detach().abs(), torch.tensor(STD).double(), rtol=0.12, atol=0)


class TrueSamples:
    """An endless stream of the mixture."""

    batch_size = 256

    def open(self, start: int, rows: list[tuple[int, int]], seed: int, device: torch.device) -> Iterator[list[Batch]]:
        for step in itertools.count(start):
            samples = true_samples(self.batch_size, seed=step + 10).float()
            yield [{"image": samples[low:high]} for low, high in rows]


@pytest.mark.slow
def test_a_student_of_a_mixture_matches_mean_covariance_and_weights(tmp_path: Path):
    """From data to a teacher's network, and from the exact teacher to one step."""
    exact = Generator(exact_denoiser(mixture(), EDMProcess()), (2,))

    def matched(start: Generator) -> DMD2:
        return DMD2(exact, student=start, fake_score=copy.deepcopy(start.denoiser).requires_grad_(True))

    torch.manual_seed(0)
    start = Generator(toy_denoiser(), (2,), codec=Pixels(0.0, 1.0))
    rates = {"student": Optim("adam", lr=1e-3), "fake_score": Optim("adam", lr=5e-4)}
    stages = [
        Stage(Denoising(start, {"train": TrueSamples()}), 1500, {"default": Optim("adam", lr=5e-3, schedule="cosine")}),
        Stage(matched, 6000, rates, name="dmd2"),
    ]
    run = {"batch_size": 256, "noise_block": 256, "progress": False, "device": "cpu", "ema_decay": 0.99}
    result = train(stages, Run(str(tmp_path), **run))
    samples = result.ema.sample(noise_of(6000).float()).double()
    truth, held = true_samples(200_000), mixture()
    torch.testing.assert_close(samples.mean(0), truth.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(truth.T), rtol=0, atol=0.05)
    shares = torch.bincount(torch.cdist(samples, held.means).argmin(1), minlength=3) / len(samples)
    torch.testing.assert_close(shares.double(), held.weights, rtol=0, atol=0.04)
