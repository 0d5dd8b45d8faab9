"""Which pipeline of diffusers samples as a generator does, and what goes into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.codecs import Latents, Pixels
from diffusion.conditions import ClassLabels, Prompts
from diffusion.export.schedulers import adapter_of, scheduler_for
from diffusion.generator import Generator
from diffusion.models.folder import assemble
from diffusion.models.lora import is_lora, merged
from diffusion.models.networks import DiffusersNetwork, inner_model, with_denoiser
from diffusion.process import FlowProcess, VPProcess

GUIDANCE_WIDTH = 8
"""Of the guidance embedding that makes a text pipeline leave guidance to the network."""


@dataclass(frozen=True)
class PipelinePlan:
    """How a generator becomes a folder.

    Attributes:
        pipeline: of diffusers, whole.
        call: arguments without which its call would not sample as the generator does.
        seeds_call: whether its call hands `generator=` on to the scheduler; else the global seed counts.
        notes: what a user has to know.
    """

    pipeline: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    seeds_call: bool = True
    notes: tuple[str, ...] = ()


def plan(generator: Generator, steps: int) -> PipelinePlan:
    """The pipeline for a generator, around the generator's own modules where these need no change.

    Args:
        generator: on the CPU, in float32.
        steps: that it is to take.

    Raises:
        ValueError: no pipeline of diffusers samples so; the message names the part and the cure.
    """
    if is_lora(generator.denoiser):
        generator = with_denoiser(generator, merged(generator.denoiser))
    model = inner_model(generator.denoiser)
    make = {
        "UNet2DModel": _pixels,
        "UNet2DConditionModel": _text,
        "DiTTransformer2DModel": _dit,
        "SD3Transformer2DModel": _text,
    }
    kind = type(model).__name__
    if not isinstance(adapter_of(generator), DiffusersNetwork) or kind not in make:
        raise ValueError(
            f"{kind} is no network of a diffusers pipeline that is written here ({', '.join(make)}): "
            f"distil into one of these, or save its state dict with torch"
        )
    _check_guidance(generator, kind)
    return make[kind](generator, model, steps)


def _check_guidance(generator: Generator, kind: str) -> None:
    """None of these pipelines guides in an interval; only `UNet2DConditionModel`'s rescale, by the same formula."""
    if generator.guidance_scale == 1:
        return
    if generator.guidance_interval is not None:
        raise ValueError(
            f"no pipeline of {kind} guides in an interval: export with guidance_interval=None, not "
            f"{list(generator.guidance_interval)}, or distil the guided teacher"
        )
    if generator.guidance_rescale and kind != "UNet2DConditionModel":
        raise ValueError(
            f"no pipeline of {kind} rescales guidance: export with guidance_rescale=0, not "
            f"{generator.guidance_rescale}, or distil the guided teacher"
        )


def _pixels(generator: Generator, model: nn.Module, steps: int) -> PipelinePlan:
    import diffusers

    codec, labels, student = generator.codec, generator.conditions, generator.sampler == "student"
    if not isinstance(codec, Pixels) or (codec.low, codec.high) != (-1, 1):
        raise ValueError(f"pipelines of UNet2DModel have pixels in [-1, 1], not {codec}: train it with Pixels(-1, 1)")
    if generator.guidance_scale != 1:
        raise ValueError(
            f"no pipeline of UNet2DModel guides: export with guidance_scale=1, not {generator.guidance_scale}, or "
            f"distil the guided teacher"
        )
    scheduler = scheduler_for(generator, steps)
    if isinstance(generator.process, FlowProcess):
        if labels is not None:
            raise ValueError(
                "no pipeline of diffusers samples a class-conditional UNet2DModel on the linear path: take a process "
                "on a table (diffusion.models.vp), or leave the labels out"
            )
        notes = (f"`num_inference_steps={steps}` is part of the scheduler's grid: no other number is right.",)
        return PipelinePlan(diffusers.DDPMPipeline(model, scheduler), notes=notes)
    if isinstance(labels, ClassLabels) and labels.null and student:
        model = _without_null_label(model, labels.num_classes)
    if labels is None and not student:
        return PipelinePlan(diffusers.DDIMPipeline(model, scheduler))
    pipeline = diffusers.ConsistencyModelPipeline(model, scheduler)
    random = "Without `class_labels` the pipeline draws labels at random, from the global seed."
    return PipelinePlan(pipeline, notes=(random,) if labels is not None else ())


def _without_null_label(model: nn.Module, num_classes: int) -> nn.Module:
    """The network without its null label: students are sampled unguided, and the pipeline draws from all labels."""
    state = model.state_dict()
    state["class_embedding.weight"] = state["class_embedding.weight"][:num_classes].clone()
    smaller = type(model).from_config({**model.config, "num_class_embeds": num_classes})
    smaller.load_state_dict(state)
    return smaller.eval().requires_grad_(False)


def _dit(generator: Generator, model: nn.Module, steps: int) -> PipelinePlan:
    import diffusers

    codec = _latents(generator, "DiTPipeline")
    if not isinstance(generator.process, VPProcess):
        raise ValueError(
            f"DiTPipeline samples on a table alone, not on {generator.process!r}: take diffusion.models.vp"
        )
    pipeline = diffusers.DiTPipeline(model, codec.vae, scheduler_for(generator, steps))
    guided = "The call guides by 4 unless told otherwise, with label 1000 for the null label: give `guidance_scale`."
    if generator.num_classes < 1000:
        guided = (
            f"**`guidance_scale=1` is not optional: without it the call fails.** The pipeline guides by default, with "
            f"label 1000 for the null label, and this network's table has {generator.num_classes} classes."
        )
    seeded = "The call does not hand `generator=` on: after the first step noise comes from `torch.manual_seed`."
    guidance = {"guidance_scale": float(generator.guidance_scale)}
    if generator.guidance_scale != 1 and generator.num_classes != 1000:
        raise ValueError(
            f"DiTPipeline guides by label 1000, and this network has {generator.num_classes} classes: export with "
            f"guidance_scale=1, or distil the guided teacher"
        )
    return PipelinePlan(pipeline, guidance, seeds_call=False, notes=(guided, seeded))


def _text(generator: Generator, model: nn.Module, steps: int) -> PipelinePlan:
    prompts = generator.conditions
    if not isinstance(prompts, Prompts) or prompts.encoders is None:
        raise ValueError(f"{type(model).__name__} is exported with its text encoders: open its teacher with prompts")
    codec, guided = _latents(generator, prompts.encoders.pipeline), generator.guidance_scale != 1
    part, call = "transformer", {"guidance_scale": float(generator.guidance_scale)}
    if type(model).__name__ == "UNet2DConditionModel":
        part = "unet"
        if not guided:
            model, call = _self_guided(model), {}
        elif generator.guidance_rescale:
            call["guidance_rescale"] = float(generator.guidance_rescale)
    models = {part: model, "vae": codec.vae, "scheduler": scheduler_for(generator, steps)}
    pipeline = assemble(Path(prompts.encoders.folder), models)
    if not call:
        return PipelinePlan(pipeline, notes=(SELF_GUIDED,))
    named = ", ".join(f"{name}={value:g}" for name, value in call.items())
    told = f"The call guides otherwise unless told: give `{named}`."
    return PipelinePlan(pipeline, call, seeds_call=part == "unet", notes=(told,))


SELF_GUIDED = (
    "Guidance is off whatever `guidance_scale` says: the network has a guidance embedding (`time_cond_proj_dim`) of "
    "zeros, so that the pipeline leaves guidance to it."
)


def _self_guided(model: nn.Module) -> nn.Module:
    """The same network with a guidance embedding of zeros, so that the pipeline's default of 7.5 changes nothing."""
    if model.config.time_cond_proj_dim is not None:
        return model
    wider = type(model).from_config({**model.config, "time_cond_proj_dim": GUIDANCE_WIDTH})
    projection = wider.time_embedding.cond_proj.weight
    wider.load_state_dict(model.state_dict() | {"time_embedding.cond_proj.weight": torch.zeros_like(projection)})
    return wider.eval().requires_grad_(False)


def _latents(generator: Generator, pipeline: str) -> Latents:
    codec = generator.codec
    if not isinstance(codec, Latents):
        raise ValueError(f"{pipeline} decodes latents, and this generator makes {codec}: open a teacher with a VAE")
    own = (codec.vae.config.scaling_factor, getattr(codec.vae.config, "shift_factor", None) or 0.0)
    if (codec.scaling_factor, codec.shift_factor) != own:
        raise ValueError(f"the latents' scale and shift {codec.extra_repr()} are not the autoencoder's own {own}")
    return codec
