"""A player's optimiser and schedule, from timm; fused where torch has it, so that the guard costs no sync."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.settings import Optim

FUSED = ("adam", "adamw", "sgd", "momentum")


def build_optimizer(module: nn.Module, settings: Optim, player: str) -> torch.optim.Optimizer:
    """timm's optimiser over the trainable parameters of `module`, biases and norms without decay.

    Raises:
        SettingsError: unknown optimiser, or options that it does not take.
    """
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = dict(settings.options)
    if settings.name in FUSED:
        options["fused"] = True
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    try:
        optimizer = create_optimizer_v2(
            module, opt=settings.name, lr=settings.lr, weight_decay=settings.weight_decay, **options
        )
    except (TypeError, ValueError, KeyError) as error:
        raise SettingsError(f"optim of player '{player}': {settings.name!r} cannot be built: {error}") from error
    _start_momentum(optimizer)
    return optimizer


def is_gated(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser skips an update by a flag on the device (`found_inf`)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def build_scheduler(optimizer: torch.optim.Optimizer, settings: Optim, steps: int) -> Any | None:
    """timm's scheduler by step, or None where the rate never changes."""
    if settings.schedule == "constant" and settings.warmup == 0:
        return None
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler

    for group in optimizer.param_groups:
        # timm's schedulers start from the plain rate and multiply by `lr_scale` (layer decay) themselves.
        group.pop("initial_lr", None)
        group["lr"] = settings.lr
    # As a prefix, so that the rate really arrives at `lr` before it falls.
    common = {"warmup_t": settings.warmup, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False}
    rest = max(steps - settings.warmup, 1)
    if settings.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=rest, **common)
    if settings.schedule == "linear":
        return PolyLRScheduler(optimizer, t_initial=rest, power=1.0, **common)
    return StepLRScheduler(optimizer, decay_t=steps + 1, **common)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    # Fused SGD whose very first update is skipped would read momentum that was never written.
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
