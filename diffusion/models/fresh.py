"""Generators around networks that are not trained yet, and around anyone's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from diffusion.codecs import Pixels
from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser, EDMPreconditioner, Interval
from diffusion.generator import Generator, Sampler
from diffusion.models.networks import DiffusersNetwork, OwnNetwork, checkpoint_gradients
from diffusion.process import EDMProcess, Process, VPProcess
from visiondistill.weights import load_weights, read_weights

Prediction = Literal["x0", "eps", "v", "velocity"]

MODEL_TIMES = 1000
"""Diffusers' models of continuous time have it in thousandths."""


def vp(
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    num_timesteps: int = 1000,
) -> VPProcess:
    """`VPProcess.from_betas` under a path that a recipe can name; the defaults are DDPM's."""
    return VPProcess.from_betas(schedule, beta_start, beta_end, num_timesteps)


class UNet2D(Generator):
    """A new diffusers UNet2DModel of pixels; the defaults (0.37 M parameters) suit 8x8 to 32x32 pixels on a CPU.

    Args:
        input_size: of the square images, (C, H, W); recipes take it from the data.
        num_classes: of class labels, with a null label besides; None: unconditional, which a recipe must say
            where its data have classes.
        process: default DDPM's table, `vp()`. On `EDMProcess` the network is preconditioned, in the
            boundary form in which diffusers' consistency scheduler opens it.
        prediction_type: what the network returns; None: "v" on tables, "velocity" on other paths,
            on EDM's "x0".
        block_out_channels: widths, one per resolution.
        layers_per_block: residual blocks per resolution.
        norm_num_groups: of group normalisation; divides every width.
        dropout: of the residual blocks.
        sigma_data: of EDM's preconditioning.
        steps, sampler, guidance_scale, guidance_interval, guidance_rescale: as of `Generator`.
        gradient_checkpointing: recompute activations in backward passes.

    Raises:
        ValueError: images that are not square, a size that the resolutions do not divide, or groups that do
            not divide a width.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        num_classes: int | None = None,
        process: Process | None = None,
        prediction_type: Prediction | None = None,
        block_out_channels: tuple[int, ...] = (24, 48),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        sigma_data: float = 0.5,
        steps: int = 18,
        sampler: Sampler = "auto",
        guidance_scale: float = 1.0,
        guidance_interval: Interval | None = None,
        guidance_rescale: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        from diffusers import UNet2DModel

        channels, size = _square(input_size)
        _check_widths(size, block_out_channels, norm_num_groups)
        levels = len(block_out_channels)
        model = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        super().__init__(
            denoiser_around(model, process or vp(), prediction_type, sigma_data, gradient_checkpointing),
            input_size,
            conditions=None if num_classes is None else ClassLabels(num_classes),
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )


class DiT(Generator):
    """A new diffusers DiTTransformer2DModel of pixels, conditioned on class labels with a null label besides.

    Args:
        input_size, num_classes: as of `UNet2D`; this model always has classes.
        patch_size: side of a token; divides the size.
        num_layers, num_attention_heads, attention_head_dim: of the transformer.
        process, prediction_type, sigma_data: as of `UNet2D`.
        steps, sampler, guidance_scale, guidance_interval, guidance_rescale: as of `Generator`.
        gradient_checkpointing: recompute activations in backward passes.

    Raises:
        ValueError: images that are not square, or a size that the patch size does not divide.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        num_classes: int,
        process: Process | None = None,
        prediction_type: Prediction | None = None,
        patch_size: int = 2,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 24,
        sigma_data: float = 0.5,
        steps: int = 18,
        sampler: Sampler = "auto",
        guidance_scale: float = 1.0,
        guidance_interval: Interval | None = None,
        guidance_rescale: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        from diffusers import DiTTransformer2DModel

        channels, size = _square(input_size)
        if size % patch_size:
            raise ValueError(f"patch_size={patch_size} is not allowed: it must divide size={size}")
        model = DiTTransformer2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            patch_size=patch_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_embeds_ada_norm=num_classes,
            attention_bias=True,
        )
        super().__init__(
            denoiser_around(model, process or vp(), prediction_type, sigma_data, gradient_checkpointing),
            input_size,
            conditions=ClassLabels(num_classes),
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )


class Custom(Generator):
    """Anyone's own network, called as `network(x_t, t)` or, with classes, `network(x_t, t, labels)`.

    Args:
        network: of codes `[B, *shape]`; t is `[B]`.
        shape: of one sample: `(C, H, W)`, or `(F, C, H, W)` for videos.
        process: the noise path that it was trained on.
        prediction_type: what it returns.
        time_scale: from the process's time to the network's: 0.001 for one that sees t/1000.
        low, high: range of pixels that it works on.
        num_classes: of class labels; the null label is `num_classes`.
        weights: file of the network's state dict, as of `visiondistill.weights.read_weights`; None: as the
            network comes.
        steps, sampler, guidance_scale, guidance_interval, guidance_rescale: as of `Generator`.
        null_label: whether the network knows the null label; false: it cannot be guided.

    Raises:
        ValueError: weights that cannot be read or do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        process: Process,
        prediction_type: Prediction,
        time_scale: float = 1.0,
        low: float = -1.0,
        high: float = 1.0,
        num_classes: int | None = None,
        weights: str | None = None,
        steps: int = 50,
        sampler: Sampler = "auto",
        guidance_scale: float = 1.0,
        guidance_interval: Interval | None = None,
        guidance_rescale: float = 0.0,
        null_label: bool = True,
    ) -> None:
        if weights is not None:
            load_weights(network, *read_weights(weights))
        super().__init__(
            Denoiser(OwnNetwork(network, time_scale), process, prediction_type),
            shape,
            codec=Pixels(low, high),
            conditions=None if num_classes is None else ClassLabels(num_classes, null_label),
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )


def denoiser_around(
    model: nn.Module,
    process: Process,
    prediction_type: str | None = None,
    sigma_data: float = 0.5,
    gradient_checkpointing: bool = False,
) -> Denoiser:
    """A diffusers model as a denoiser on a path: preconditioned on EDM's, with time in thousandths off tables.

    Raises:
        ValueError: another prediction type than "x0" on EDM's path, or no gradient checkpointing in the model.
    """
    network: nn.Module = DiffusersNetwork(model, 1 if isinstance(process, VPProcess) else MODEL_TIMES)
    if isinstance(process, EDMProcess):
        if prediction_type not in (None, "x0"):
            raise ValueError(
                f"prediction_type={prediction_type!r}: a preconditioned network on EDM's path is an x0 one"
            )
        network, kind = EDMPreconditioner(network, sigma_data, process.sigma_min), "x0"
    else:
        kind = prediction_type or ("v" if isinstance(process, VPProcess) else "velocity")
    denoiser = Denoiser(network, process, kind)
    return checkpoint_gradients(denoiser) if gradient_checkpointing else denoiser


def _square(input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Channels and side."""
    channels, height, width = input_size
    if height != width:
        raise ValueError(f"input_size={list(input_size)} is not allowed: images must be square")
    return channels, height


def _check_widths(size: int, widths: Sequence[int], groups: int) -> None:
    halvings = 2 ** (len(widths) - 1)
    # On a 1x1 map a group of one channel is normalised to a constant.
    if size % halvings or size // halvings < 2:
        raise ValueError(
            f"size={size} is not allowed: {len(widths)} widths halve it {len(widths) - 1} times, to at least 2 pixels"
        )
    if any(width % groups for width in widths):
        raise ValueError(f"norm_num_groups={groups} is not allowed: it must divide each of {list(widths)}")
