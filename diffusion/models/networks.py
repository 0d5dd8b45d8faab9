"""Networks as `Denoiser` calls them: every diffusers model by one adapter, anyone's own by another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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

    Wan takes times `[B]` or one for each token: those of frames, `[B, F]`, are given to the frames' tokens.
    Flux works on tokens: codes are packed and unpacked here, and the tokens' places (`img_ids`, `txt_ids`)
    made here, for they have no batch axis that guidance could double.

    Args:
        model: called as `model(x, timestep=..., return_dict=False, ...)`.
        time_scale: from the time that the adapter gets to that of the model's pipeline: 1 on a table of
            steps, 1000 for models of the linear path and for those of EDM's ln(sigma)/4.
        frame_axis: of videos, where the model has its frames: 2 as in `[B, C, F, H, W]`, or 1 as here.
        embedded_guidance: of models that take their guidance scale as an input (`guidance_embeds`), the one
            that they always get, in their own unit: 3.5 is usual for a distilled Flux.

    Raises:
        ValueError: no embedded_guidance for such a model, or one for another; when called, codes or a
            condition that the model does not take.
    """

    def __init__(
        self, model: nn.Module, time_scale: float = 1.0, frame_axis: int = 2, embedded_guidance: float | None = None
    ) -> None:
        super().__init__()
        _check_guidance(model, embedded_guidance)
        self.model, self.time_scale, self.frame_axis = model, time_scale, frame_axis
        self.embedded_guidance = embedded_guidance
        self._asked = next((ASKED[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in ASKED), _ask)
        for part in model.modules():
            # DiT's table drops labels of its own in train mode; which sample is unconditional is the method's choice.
            if hasattr(part, "embedding_table") and hasattr(part, "dropout_prob"):
                part.dropout_prob = 0.0

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        dtype = _precision(self.model)
        named = {"class_labels": condition} if isinstance(condition, Tensor) else condition or {}
        if self.embedded_guidance is not None:
            named = named | {"guidance": x_t.new_full((len(x_t),), self.embedded_guidance)}
        named = tree_map(lambda held: held.to(dtype) if held.is_floating_point() else held, named)
        time = t if self.time_scale == 1 else t * self.time_scale
        y = self._asked(self, x_t.to(dtype), time, named)
        return y.narrow(-3, 0, x_t.shape[-3]).to(x_t.dtype)

    def extra_repr(self) -> str:
        return "" if self.embedded_guidance is None else f"embedded_guidance={self.embedded_guidance}"


def _precision(model: nn.Module) -> torch.dtype:
    """Of the weights, those aside that diffusers keeps in float32 whatever it loads a model in."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return next(held.dtype for name, held in model.named_parameters() if not any(part in name for part in kept))


def _ask(network: DiffusersNetwork, x: Tensor, time: Tensor, named: Mapping[str, Any]) -> Tensor:
    video = x.ndim == 5
    x = x.movedim(1, network.frame_axis) if video else x
    y = network.model(x, timestep=time, return_dict=False, **named)[0]
    return y.movedim(network.frame_axis, 1) if video else y


def _ask_wan(network: DiffusersNetwork, x: Tensor, time: Tensor, named: Mapping[str, Any]) -> Tensor:
    """Each frame's time at every one of its tokens, which the model counts frame by frame."""
    if time.ndim == 2:
        depth, height, width = network.model.config.patch_size
        if depth != 1:
            raise ValueError(f"t of shape {tuple(time.shape)}: a token of this Wan spans {depth} frames: give t [B]")
        time = time.repeat_interleave((x.shape[-2] // height) * (x.shape[-1] // width), 1)
    return _ask(network, x, time, named)


def _ask_flux(network: DiffusersNetwork, x: Tensor, time: Tensor, named: Mapping[str, Any]) -> Tensor:
    """As FluxPipeline does: 2x2 places of a code are one token, times are in [0, 1], texts have no place."""
    _check_flux(network.model, x, named)
    high, wide = x.shape[-2] // 2, x.shape[-1] // 2
    image = torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in (1, high, wide)))
    text = image.new_zeros(named["encoder_hidden_states"].shape[1], 3)
    tokens = F.pixel_unshuffle(x, 2).flatten(2).mT
    y = network.model(tokens, timestep=time / 1000, img_ids=image, txt_ids=text, return_dict=False, **named)[0]
    return F.pixel_shuffle(y.mT.unflatten(2, (high, wide)), 2)


ASKED: Mapping[str, Callable[[DiffusersNetwork, Tensor, Tensor, Mapping[str, Any]], Tensor]] = {
    "WanTransformer3DModel": _ask_wan,
    "FluxTransformer2DModel": _ask_flux,
}
"""Models of diffusers that are not called as the others."""


def _check_guidance(model: nn.Module, embedded_guidance: float | None) -> None:
    takes = getattr(getattr(model, "config", None), "guidance_embeds", False)
    if takes and embedded_guidance is None:
        raise ValueError(
            f"{type(model).__name__} takes its guidance scale as an input (guidance_embeds): say embedded_guidance, "
            f"such as 3.5 for Flux"
        )
    if not takes and embedded_guidance is not None:
        raise ValueError(
            f"embedded_guidance={embedded_guidance}: {type(model).__name__} takes no guidance scale as an input "
            f"(guidance_embeds): leave it out"
        )


def _check_flux(model: nn.Module, x: Tensor, named: Mapping[str, Any]) -> None:
    channels = model.config.in_channels // 4
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"x_t of shape {tuple(x.shape)}: this Flux takes [B, {channels}, H, W] with even H and W, not packed"
        )
    texts = {"encoder_hidden_states", "pooled_projections"}
    if (given := named.keys() - {"guidance"}) != texts:
        raise ValueError(
            f"the condition names {', '.join(sorted(given)) or 'nothing'}: Flux takes {' and '.join(sorted(texts))}, "
            f"and its ids are made for it"
        )


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
