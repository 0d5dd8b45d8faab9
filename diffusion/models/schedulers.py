"""What a scheduler of diffusers says about how its model was trained: the noise path and the prediction type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.process import EDMProcess, FlowProcess, Process, VPProcess

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""Of schedulers on a table, in our words."""

TABLES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
CONSISTENCY = "CMStochasticIterativeScheduler"
KNOWN = (*TABLES, *FLOWS, CONSISTENCY)

TABLE_FIELDS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "set_alpha_to_one",
    "timestep_spacing",
    "steps_offset",
}
FLOW_FIELDS = {"num_train_timesteps", "shift", "stochastic_sampling", "shift_terminal"}
EDM_FIELDS = {"num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "rho"}

OF_THE_SAMPLER = {
    "clip_sample",
    "clip_sample_range",
    "clip_denoised",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "variance_type",
    "interpolation_type",
    "algorithm_type",
    "solver_order",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "final_sigmas_type",
    "lambda_min_clipped",
    "timestep_type",
    "use_karras_sigmas",
    "skip_prk_steps",
    "predict_x0",
    "disable_corrector",
    "original_inference_steps",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "upscale_mode",
}
"""Fields that say how that scheduler walks, and nothing about the model: its teacher is read without them."""


@dataclass(frozen=True)
class Noising:
    """How a model was trained.

    Attributes:
        process, prediction_type: as of `Denoiser`.
        time_scale: from the process's time to the model's.
        few_steps: whether the folder samples as students do, with fresh noise between its steps.
        sigma_data: of EDM's preconditioning; None for a network without it.
        notes: what the folder's own scheduler does besides.
    """

    process: Process
    prediction_type: str
    time_scale: float = 1.0
    few_steps: bool = False
    sigma_data: float | None = None
    notes: tuple[str, ...] = ()


class SpacedVPProcess(VPProcess):
    """A table whose sampling grid is spaced as its scheduler says.

    Args:
        spacing, steps_offset: defaults of `timesteps`.
    """

    def __init__(
        self, alphas_cumprod: Tensor, final_alpha_cumprod: float = 1.0, spacing: str = "leading", steps_offset: int = 0
    ) -> None:
        super().__init__(alphas_cumprod, final_alpha_cumprod)
        self.spacing, self.steps_offset = spacing, steps_offset

    def timesteps(self, n: int, spacing: str | None = None, steps_offset: int | None = None) -> Tensor:
        offset = self.steps_offset if steps_offset is None else steps_offset
        times = super().timesteps(n, spacing or self.spacing, offset)
        if times[0] >= self.alphas_cumprod.numel():
            raise ValueError(f"n={n} is not allowed: with steps_offset={offset} it leaves the table of {self!r}")
        return times


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError, which names the file, where it is no JSON object."""
    try:
        read = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} holds a {type(read).__name__}, not an object of names: fetch it again")
    return read


def read_scheduler(folder: Path) -> Noising:
    """Read `folder/scheduler_config.json`.

    Raises:
        ValueError: no such file, a scheduler that is not known, a field whose meaning for the model is
            not known and that is not at its default, or a table that its own fields do not give.
    """
    import diffusers

    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: the folder does not say how its model was noised. Fetch it again")
    config = read_json(file)
    name = config.get("_class_name")
    if name not in KNOWN:
        raise ValueError(
            f"{file}: the scheduler {name} is not known; one of {', '.join(KNOWN)} says how it was trained"
        )
    scheduler = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
    read = {CONSISTENCY: _edm} | dict.fromkeys(TABLES, _table) | dict.fromkeys(FLOWS, _flow)
    return read[name](scheduler, file)


def _table(scheduler: Any, file: Path) -> Noising:
    config = scheduler.config
    notes = _refuse_others(scheduler, TABLE_FIELDS | {"timestep_scaling"}, file)
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"{file}: prediction_type={kind!r} is not known on a table: one of {', '.join(PREDICTIONS)}")
    if config.get("timestep_scaling", 10.0) < 10:
        raise ValueError(f"{file}: timestep_scaling={config['timestep_scaling']} mixes x_t into samples: set it to 10")
    table = _alphas_cumprod(config, file)
    _compare(table, scheduler.alphas_cumprod, file)
    few = type(scheduler).__name__ == "LCMScheduler"
    final = 1.0 if config.get("set_alpha_to_one", True) else table[0].item()
    # LCM's scheduler has these two fields and reads neither.
    spaced = () if few else (config.get("timestep_spacing", "leading"), config.get("steps_offset", 0))
    process = SpacedVPProcess(table, final, *spaced)
    return Noising(process, PREDICTIONS[kind], few_steps=few, notes=notes)


def _alphas_cumprod(config: Mapping[str, Any], file: Path) -> Tensor:
    total = config["num_train_timesteps"]
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        if len(betas) != total:
            raise ValueError(f"{file}: {len(betas)} trained_betas for num_train_timesteps={total}: make them equal")
        table = torch.cumprod(1 - betas, 0)
    else:
        try:
            process = VPProcess.from_betas(config["beta_schedule"], config["beta_start"], config["beta_end"], total)
        except ValueError as error:
            raise ValueError(f"{file}: beta_schedule: {error}") from error
        table = process.alphas_cumprod
    return zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The table stretched so that it ends at 0 and begins as before.

    Source: Lin et al. 2024 (Common diffusion noise schedules and sample steps are flawed), algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _compare(table: Tensor, theirs: Tensor, file: Path) -> None:
    # diffusers multiplies in float32, and keeps 2^-24 where a table ends at zero.
    apart = (table - theirs.double()).abs() / (1e-3 * table + 1e-6)
    if len(table) != len(theirs) or apart.max() > 1:
        worst = int(apart.argmax()) if len(table) == len(theirs) else 0
        raise ValueError(
            f"{file}: the table of the scheduler is not the one that its fields give (entry {worst}: "
            f"{theirs[worst]:.6g} against {table[worst]:.6g}): write the table out as trained_betas"
        )


def _flow(scheduler: Any, file: Path) -> Noising:
    config, few = scheduler.config, type(scheduler).__name__ == "FlowMatchLCMScheduler"
    notes = _refuse_others(scheduler, FLOW_FIELDS, file)
    few = few or bool(config.get("stochastic_sampling"))
    return Noising(FlowProcess(config["shift"]), "velocity", config["num_train_timesteps"], few_steps=few, notes=notes)


def _edm(scheduler: Any, file: Path) -> Noising:
    config = scheduler.config
    notes = _refuse_others(scheduler, EDM_FIELDS, file)
    # A folder of ours for one step has no boundary, which a path must have: where the grid ends says nothing there.
    process = EDMProcess(config["sigma_min"] or 0.002, config["sigma_max"], config["rho"])
    return Noising(process, "x0", 1000, few_steps=True, sigma_data=config["sigma_data"], notes=notes)


def _refuse_others(scheduler: Any, honoured: set[str], file: Path) -> tuple[str, ...]:
    """Notes on fields of the sampler; a field that is neither honoured nor of the sampler must be at its default."""
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(type(scheduler).__init__).parameters.items()}
    given = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    changed = {name: value for name, value in given.items() if name not in honoured and value != defaults.get(name)}
    unknown = sorted(set(changed) - OF_THE_SAMPLER)
    if unknown:
        name = unknown[0]
        raise ValueError(
            f"{file}: {name}={changed[name]!r} is not supported: set it to {defaults.get(name)!r} where the model "
            f"allows it"
        )
    clips = [name for name in ("clip_sample", "clip_denoised", "thresholding") if given.get(name)]
    return tuple(f"{name} of its scheduler is left out: the model is read as it is" for name in clips)
