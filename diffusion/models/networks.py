"""Networks as `Denoiser` calls them: every diffusers model by one adapter, anyone's own by another."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion.denoiser import Denoiser
from diffusion.generator import Generator


class DiffusersNetwork(nn.Module):
    """Any denoising model of diffusers as `network(x_t, t, condition)`.

    They agree on the sample first, `timestep`, and conditions by name: a tensor is given as `class_labels`
    (UNet2DModel, DiT), a dict by its own names (`encoder_hidden_states`, `added_cond_kwargs`,
    `pooled_projections` ...: UNet2DConditionModel, SD3, Sana, Wan). Of models that also learn a
    variance, such as DiT, the prediction alone is returned. Runs in the model's own precision and
    returns x_t's.

    Args:
        model: called as `model(x, timestep=..., return_dict=False, ...)`.
        time_scale: from the time that the adapter gets to the model's: 1 on a table of steps, 1000 for
            models of the linear path and for those of EDM's ln(sigma)/4.
        frame_axis: of videos, where the model has its frames: 2 as in `[B, C, F, H, W]`, or 1 as here.
    """

    def __init__(self, model: nn.Module, time_scale: float = 1.0, frame_axis: int = 2) -> None:
        super().__init__()
        self.model, self.time_scale, self.frame_axis = model, time_scale, frame_axis
        for part in model.modules():
            # DiT's table drops labels of its own in train mode; which sample is unconditional is the method's choice.
            if hasattr(part, "embedding_table") and hasattr(part, "dropout_prob"):
                part.dropout_prob = 0.0

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        named = {"class_labels": condition} if isinstance(condition, Tensor) else condition or {}
        named = tree_map(lambda held: held.to(dtype) if held.is_floating_point() else held, named)
        video = x_t.ndim == 5
        x = x_t.movedim(1, self.frame_axis) if video else x_t
        time = t if self.time_scale == 1 else t * self.time_scale
        y = self.model(x.to(dtype), timestep=time, return_dict=False, **named)[0]
        y = y.movedim(self.frame_axis, 1) if video else y
        return y.narrow(-3, 0, x_t.shape[-3]).to(x_t.dtype)


class OwnNetwork(nn.Module):
    """Anyone's module as `network(x_t, t, condition)`: it is called with the condition where there is one.

    Args:
        model: called as `model(x_t, t)` or `model(x_t, t, condition)`.
        time_scale: from the process's time to the model's, such as 1/1000 for one that sees t/T.
    """

    def __init__(self, model: nn.Module, time_scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.time_scale = model, time_scale

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        time = t if self.time_scale == 1 else (t * self.time_scale).to(x_t.dtype)
        return self.model(x_t, time) if condition is None else self.model(x_t, time, condition)


def inner_model(denoiser: Denoiser) -> nn.Module:
    """The model itself, below preconditioning and adapter."""
    network = denoiser.network
    while isinstance(network, nn.Module) and not isinstance(network, DiffusersNetwork | OwnNetwork):
        if not isinstance(inner := getattr(network, "network", None), nn.Module):
            return network
        network = inner
    return getattr(network, "model", network)


def with_denoiser(generator: Generator, denoiser: Denoiser) -> Generator:
    """The same generator around another denoiser; codec and conditions are shared."""
    changed = copy.copy(generator)
    changed._modules = dict(generator._modules) | {"denoiser": denoiser}
    return changed


def frozen_copy(generator: Generator, dtype: torch.dtype = torch.bfloat16) -> Generator:
    """A teacher whose denoiser is a copy in another precision that only predicts: half of float32's memory.

    The copy is as exact as `dtype`; make students of the original.

    Raises:
        ValueError: a network that is not of diffusers and need not convert what it is given.
    """
    if not any(isinstance(part, DiffusersNetwork) for part in generator.denoiser.modules()):
        raise ValueError(
            f"{type(inner_model(generator.denoiser)).__name__} is no network of diffusers and may not convert what it "
            f"is given to {str(dtype).removeprefix('torch.')}: leave the teacher in its own precision"
        )
    denoiser = copy.deepcopy(generator.denoiser).to(dtype).eval().requires_grad_(False)
    return with_denoiser(generator, denoiser)


def checkpoint_gradients(denoiser: Denoiser) -> Denoiser:
    """Recompute the model's activations in backward passes instead of keeping them.

    Raises:
        ValueError: the model has no such switch.
    """
    model = inner_model(denoiser)
    if not hasattr(model, "enable_gradient_checkpointing"):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing: set gradient_checkpointing to false")
    try:
        model.enable_gradient_checkpointing()
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing: {error}") from error
    return denoiser
