"""Schedulers of diffusers that walk as a generator samples, with every field written out."""

from __future__ import annotations

from typing import Any

import torch

from diffusion.denoiser import EDMPreconditioner
from diffusion.generator import Generator
from diffusion.models.schedulers import PREDICTIONS
from diffusion.process import EDMProcess, FlowProcess, Process, VPProcess

STRAIGHT = 1e6
"""LCM's factor on times: with it the sample is the prediction alone, without a share of x_t."""


def scheduler_for(generator: Generator, steps: int) -> Any:
    """A scheduler under which `num_inference_steps=steps` is `generator.sample(..., steps=steps)`.

    Raises:
        ValueError: no scheduler of diffusers walks so; the message says which setting it cannot express.
    """
    process, sampler = generator.process, generator.sampler
    make = {
        (VPProcess, "student"): _lcm,
        (VPProcess, "ddim"): _ddim,
        (EDMProcess, "student"): _consistency,
        (FlowProcess, "student"): _flow,
        (FlowProcess, "euler"): _flow,
    }
    found = [each for (path, walk), each in make.items() if isinstance(process, path) and walk == sampler]
    if not found:
        raise ValueError(
            f"no scheduler of diffusers samples by {sampler!r} on {process!r}: export a student (sampler 'student') on "
            f"a VP, EDM or linear path, or a teacher that samples by 'ddim' on a table or by 'euler' on the linear path"
        )
    scheduler = found[0](generator, steps)
    _check_grid(scheduler, generator, steps)
    return scheduler


def _lcm(generator: Generator, steps: int) -> Any:
    from diffusers import LCMScheduler

    process = generator.process
    return LCMScheduler(
        **_table_fields(generator),
        # The whole table, of which it takes every (T/n)-th entry: right for each number of steps that divides T.
        original_inference_steps=process.alphas_cumprod.numel(),
        # It reads no offset, and text pipelines warn of every other one.
        steps_offset=1,
        timestep_spacing="leading",
        timestep_scaling=STRAIGHT,
    )


def _ddim(generator: Generator, steps: int) -> Any:
    from diffusers import DDIMScheduler

    process = generator.process
    _check_landings(generator, steps)
    return DDIMScheduler(
        **_table_fields(generator),
        steps_offset=getattr(process, "steps_offset", 0),
        timestep_spacing=getattr(process, "spacing", "leading"),
    )


def _table_fields(generator: Generator) -> dict[str, Any]:
    process, kind = generator.process, generator.denoiser.prediction_type
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if kind not in names:
        raise ValueError(f"prediction_type={kind!r} on a table is not known to diffusers: one of {', '.join(names)}")
    last, first = process.final_alpha_cumprod, process.alphas_cumprod[0].item()
    if last != 1 and abs(last - first) > 1e-9:
        raise ValueError(
            f"final_alpha_cumprod={last} cannot be said to diffusers: 1 or the table's first entry {first}"
        )
    return {
        "num_train_timesteps": process.alphas_cumprod.numel(),
        **betas_of(process),
        "rescale_betas_zero_snr": False,
        "prediction_type": names[kind],
        "set_alpha_to_one": last == 1,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
    }


def betas_of(process: VPProcess) -> dict[str, Any]:
    """The table by its schedule's name where it has one, else written out."""
    table = process.alphas_cumprod
    betas = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
    start, end = (float(f"{value:.10g}") for value in (betas[0].item(), betas[-1].item()))
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        if _is_named(table, schedule, start, end):
            return {"beta_schedule": schedule, "beta_start": start, "beta_end": end, "trained_betas": None}
    return {"beta_schedule": "linear", "beta_start": start, "beta_end": end, "trained_betas": betas.tolist()}


def _is_named(table: torch.Tensor, schedule: str, start: float, end: float) -> bool:
    try:
        named = VPProcess.from_betas(schedule, start, end, table.numel())
    except ValueError:  # these betas are no table of that schedule
        return False
    return torch.allclose(named.alphas_cumprod, table, rtol=1e-8, atol=0)


def _consistency(generator: Generator, steps: int) -> Any:
    from diffusers import CMStochasticIterativeScheduler

    process, network = generator.process, generator.denoiser.network
    if not isinstance(network, EDMPreconditioner) or generator.denoiser.prediction_type != "x0":
        raise ValueError("diffusers has EDM's path with EDM's preconditioning alone: wrap the network in it")
    if steps > 1 and network.sigma_min != process.sigma_min:
        raise ValueError(
            f"{steps} steps on EDM's path are opened by diffusers in the boundary form alone: build the student with "
            f"EDMPreconditioner(network, sigma_min={process.sigma_min}), or export it with 1 step"
        )
    return CMStochasticIterativeScheduler(
        num_train_timesteps=1000,
        sigma_min=network.sigma_min,
        sigma_max=process.sigma_max,
        sigma_data=network.sigma_data,
        s_noise=1.0,
        rho=process.rho,
        clip_denoised=False,
    )


def _flow(generator: Generator, steps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if generator.denoiser.prediction_type != "velocity":
        raise ValueError(
            f"prediction_type={generator.denoiser.prediction_type!r} on the linear path is not known to diffusers: "
            f"'velocity'"
        )
    times = generator.times(steps)
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=round(adapter_of(generator).time_scale),
        shift=generator.process.shift if steps == 1 else 1.0,
        # Its own grid ends one training step before 0; ours ends one sampling step before.
        shift_terminal=None if steps == 1 else times[-2].item(),
        stochastic_sampling=generator.sampler == "student",
        use_dynamic_shifting=False,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        invert_sigmas=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        time_shift_type="exponential",
    )


def adapter_of(generator: Generator) -> Any:
    """Its network below EDM's preconditioning."""
    network = generator.denoiser.network
    return network.network if isinstance(network, EDMPreconditioner) else network


def _check_grid(scheduler: Any, generator: Generator, steps: int) -> None:
    process: Process = generator.process
    wanted = generator.times(steps)[:-1].double()
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps if isinstance(process, VPProcess) else scheduler.sigmas[:-1]
    # Off tables the scheduler takes time and noise level for one.
    levels = wanted if isinstance(process, VPProcess) else process.sigma(wanted)
    for ours in (wanted, levels):
        if len(theirs) != len(ours) or not torch.allclose(theirs.double(), ours, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"{type(scheduler).__name__} cannot walk the {steps} times {_said(ours)}; its own: {_said(theirs)}. "
                f"Take a number of steps that divides the table, or a linear path without shift and snapping"
            )


def _check_landings(generator: Generator, steps: int) -> None:
    """DDIMScheduler goes down by T // steps from each of its times, whichever comes next among them."""
    times = generator.times(steps)
    landings = (times[:-1] - generator.process.alphas_cumprod.numel() // steps).clamp(min=-1)
    wrong = (landings != times[1:]).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise ValueError(
            f"DDIMScheduler cannot walk the {steps} times {_said(times[:-1])}: from {times[at]} it goes to "
            f"{landings[at]}, not to {times[at + 1]}. Take timestep_spacing 'leading', or 'trailing' with a number of "
            f"steps that divides the table"
        )


def _said(times: torch.Tensor) -> str:
    return ", ".join(f"{time:.6g}" for time in times.tolist())
