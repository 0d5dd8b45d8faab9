"""Samplers as free functions of one signature.

`f(model, x, timesteps, process, *, prediction_type, return_trajectory=False)`: `model(x, t)` gets t
as `[B]` and returns `prediction_type`. `timesteps` holds N+1 descending times, the last one being the
end: a tensor `[N+1]` or `[N+1, B]`, or a list of numbers or `[B]` tensors. The result is x, or
`(x, trajectory)` with the trajectory `[N+1, B, ...]` starting at the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.process import Process
from diffusion.tensors import Time, as_tensor, expand_time, lead, lift

Model = Callable[[Tensor, Tensor], Tensor]
Times = Tensor | Sequence[Time]
Sampled = Tensor | tuple[Tensor, Tensor]
Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def euler(
    model: Model,
    x: Tensor,
    timesteps: Times,
    process: Process,
    *,
    prediction_type: str = "velocity",
    return_trajectory: bool = False,
) -> Sampled:
    """First order: x + (r - t)*velocity, in the process's own time (EDM: sigma)."""

    def step(i: int, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return _move(x, _velocity(model, x, t, process, prediction_type), t, r)

    return _walk(x, timesteps, step, return_trajectory)


def heun(
    model: Model,
    x: Tensor,
    timesteps: Times,
    process: Process,
    *,
    prediction_type: str = "velocity",
    return_trajectory: bool = False,
) -> Sampled:
    """Second order: the mean of the velocities at departure and arrival; Euler where sigma(r) = 0.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """

    def step(i: int, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        here = _velocity(model, x, t, process, prediction_type)
        arrival = _move(x, here, t, r)
        clean = process.sigma(r) == 0
        if clean.all():  # deliberate sync: it saves a pass
            return arrival
        there = _velocity(model, arrival, r, process, prediction_type)
        return torch.where(lead(clean, x), arrival, _move(x, (here + there) / 2, t, r))

    return _walk(x, timesteps, step, return_trajectory)


def ddim(
    model: Model,
    x: Tensor,
    timesteps: Times,
    process: Process,
    *,
    prediction_type: str = "eps",
    eta: float = 0.0,
    noises: Sequence[Tensor] | None = None,
    return_trajectory: bool = False,
) -> Sampled:
    """`ddim_step` along the grid; eta=1 on a `VPProcess` is DDPM with the posterior ("fixed_small") variance.

    Args:
        noises: one per step, read where eta > 0; None draws them.
    """

    def step(i: int, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        prediction, wide = model(x, expand_time(t, x)), lift(x)
        x0 = process.convert(prediction, wide, t, prediction_type, "x0")
        eps = process.convert(prediction, wide, t, prediction_type, "eps")
        noise = _noise(noises, i, x) if eta else None
        return ddim_step(x, x0, t, r, process, eps=eps, eta=eta, noise=noise)

    return _walk(x, timesteps, step, return_trajectory)


def ddim_step(
    x_t: Tensor,
    x0: Tensor,
    t: Time,
    r: Time,
    process: Process,
    *,
    eps: Tensor | None = None,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """alpha_r*x0 + sqrt(sigma_r^2 - s^2)*eps + s*noise, from t to r.

    s = eta * (sigma_r/sigma_t) * sqrt(sigma_t^2 - (alpha_t/alpha_r)^2 * sigma_r^2).
    Source: Song et al. 2021 (DDIM), equations 12 and 16.

    Args:
        x_t, x0: `[B, ...]`.
        eps: default (x_t - alpha_t*x0)/sigma_t; give it where x0 and eps are guided separately (LCM).
        noise: needed where eta > 0.

    Raises:
        ValueError: eta > 0 without noise.
    """
    if eta and noise is None:
        raise ValueError(f"eta={eta} needs noise; eta=0 is deterministic")
    x0, eps = lift(x0), process.convert(x0, lift(x_t), t, "x0", "eps") if eps is None else lift(eps)
    alpha_r, sigma_r = lead(process.alpha(r), x_t), lead(process.sigma(r), x_t)
    if not eta:
        return (alpha_r * x0 + sigma_r * eps).to(x_t.dtype)
    alpha_t, sigma_t = lead(process.alpha(t), x_t), lead(process.sigma(t), x_t)
    s = eta * (sigma_r / sigma_t) * (sigma_t**2 - (alpha_t / alpha_r * sigma_r) ** 2).clamp(min=0).sqrt()
    kept = (sigma_r**2 - s**2).clamp(min=0).sqrt()
    return (alpha_r * x0 + kept * eps + s * lift(noise)).to(x_t.dtype)


def ddim_invert(
    model: Model,
    x0: Tensor,
    timesteps: Times,
    process: Process,
    *,
    prediction_type: str = "eps",
    return_trajectory: bool = False,
) -> Sampled:
    """From data to noise along *ascending* times, the data end (-1) first.

    Each step calls the model with the time of arrival on the state at the time of departure, as
    diffusers' DDIMInverseScheduler does.
    """

    def step(i: int, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        prediction, wide = model(x, expand_time(r, x)), lift(x)
        clean = process.convert(prediction, wide, t, prediction_type, "x0")
        eps = process.convert(prediction, wide, t, prediction_type, "eps")
        return ddim_step(x, clean, t, r, process, eps=eps)

    return _walk(x0, timesteps, step, return_trajectory)


def flow_map(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, timesteps: Times, *, return_trajectory: bool = False
) -> Sampled:
    """Jumps x - (t - r)*u with the average velocity u = model(x, t, r); differentiable through every jump."""

    def step(i: int, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return _move(x, model(x, expand_time(t, x), expand_time(r, x)), t, r)

    return _walk(x, timesteps, step, return_trajectory)


def renoise(
    model: Model,
    x: Tensor,
    timesteps: Times,
    process: Process,
    *,
    prediction_type: str = "x0",
    sigma_min: float = 0.0,
    noises: Sequence[Tensor] | None = None,
    return_trajectory: bool = False,
) -> Sampled:
    """Multi-step consistency sampling: x0 = model(x, t), then alpha_r*x0 + sqrt(sigma_r^2 - sigma_min^2)*noise.

    The last call's x0 is the sample. Source: Song et al. 2023 (CM), algorithm 1.

    Args:
        sigma_min: the process's `min_t` for consistency models; 0 for LCM, sCM and DMD.
        noises: N-1 tensors, one between every two calls; None draws them.
    """
    last = len(timesteps) - 2

    def step(i: int, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        x0 = process.convert(model(x, expand_time(t, x)), x, t, prediction_type, "x0")
        return x0 if i == last else _noised_again(x0, _noise(noises, i, x), r, process, sigma_min)

    return _walk(x, timesteps, step, return_trajectory)


@torch.no_grad()
def simulate_student_input(
    student: Model,
    noise: Tensor,
    timesteps: Times,
    exit_step: int,
    process: Process,
    *,
    start_noise: Tensor | None = None,
    noises: Sequence[Tensor] | None = None,
    sigma_min: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The input on which a multi-step student trains at step `exit_step`: DMD2's backward simulation.

    The student samples with `renoise` through timesteps[0 ... exit_step - 1]; its last x0 is noised to
    timesteps[exit_step] with `noise`, which is independent of all before. Exit 0 returns `noise` itself.

    Args:
        student: `student(x, t) -> x0`.
        noise: `[B, ...]`, unit variance.
        start_noise: where the simulation starts, at timesteps[0]; default a fresh draw of
            `process.start`.
        noises: exit_step - 1 tensors between the simulated calls; None draws them.
        sigma_min: as of `renoise`, by which the student will sample.

    Returns:
        x_t `[B, ...]` and its times `[B]`, without a graph. Source: Yin et al. 2024 (DMD2).

    Raises:
        ValueError: exit_step is not the index of a step.
    """
    steps = len(timesteps) - 1
    if not 0 <= exit_step < steps:
        raise ValueError(f"exit_step={exit_step} is not allowed: 0 to {steps - 1}")
    t = expand_time(timesteps[exit_step], noise)
    if exit_step == 0:
        return noise, t
    start = process.start(torch.randn_like(noise), timesteps[0]) if start_noise is None else start_noise
    x0 = renoise(student, start, timesteps[: exit_step + 1], process, noises=noises, sigma_min=sigma_min)
    level = as_tensor(timesteps[exit_step], noise.device)
    return _noised_again(x0, noise, level, process, sigma_min), t


def backward_simulation_times(timesteps: Tensor, k: int) -> Tensor:
    """Entries {0, k, k+1, N} of a grid `[N+1]`, duplicates dropped: the jumps of an AnyFlow rollout.

    Raises:
        ValueError: k outside 0 ... N-1.
    """
    end = len(timesteps) - 1
    if not 0 <= k < end:
        raise ValueError(f"k={k} is not allowed: 0 to {end - 1}")
    return timesteps[sorted({0, k, k + 1, end})]


def handover_index(base_times: Tensor, student_times: Tensor, k: int) -> int:
    """The base model's step whose time is nearest to student_times[k], the first of equals.

    0 means that the base runs no step at all: the caller must refuse.
    Source: Gandikota and Bau 2025 (Distilling diversity and control).
    """
    gap = base_times.double() - student_times[k]
    return int(gap.abs().argmin())


def _walk(x: Tensor, timesteps: Times, step: Step, return_trajectory: bool) -> Sampled:
    if len(timesteps) < 2:
        raise ValueError(f"timesteps holds {len(timesteps)} entries: at least 2, the last being the end")
    grid = [as_tensor(t, x.device) for t in timesteps]
    states = [x]
    for i in range(len(grid) - 1):
        x = step(i, x, grid[i], grid[i + 1])
        if return_trajectory:
            states.append(x)
    return (x, torch.stack(states)) if return_trajectory else x


def _noised_again(x0: Tensor, noise: Tensor, t: Tensor, process: Process, sigma_min: float) -> Tensor:
    """The path's point at t of an x0 that holds noise of sigma_min already."""
    spread = (process.sigma(t) ** 2 - sigma_min**2).clamp(min=0).sqrt()
    return (lead(process.alpha(t), x0) * lift(x0) + lead(spread, x0) * lift(noise)).to(x0.dtype)


def _velocity(model: Model, x: Tensor, t: Tensor, process: Process, prediction_type: str) -> Tensor:
    """At least float32, as all arithmetic on half precision."""
    return lift(process.convert(model(x, expand_time(t, x)), lift(x), t, prediction_type, "velocity"))


def _move(x: Tensor, velocity: Tensor, t: Tensor, r: Tensor) -> Tensor:
    span = lead(r.double() - t.double(), x).to(lift(x).dtype)
    return (x + span * lift(velocity)).to(x.dtype)


def _noise(noises: Sequence[Tensor] | None, i: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noises is None else noises[i]
