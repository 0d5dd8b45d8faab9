"""Generators from recipes: new networks, anyone's own, and pipeline folders of diffusers."""

from diffusion.models.folder import Pipeline, open_generator, store_prompts
from diffusion.models.fresh import Custom, DiT, UNet2D, denoiser_around, vp
from diffusion.models.latents import CachedLatents, cache_latents, open_latents
from diffusion.models.lora import lora, lora_state
from diffusion.models.networks import DiffusersNetwork, OwnNetwork, checkpoint_gradients, frozen_copy
from diffusion.models.prompts import encode_prompts, read_captions, read_prompts
from diffusion.models.trained import Trained

__all__ = [
    "CachedLatents",
    "Custom",
    "DiT",
    "DiffusersNetwork",
    "OwnNetwork",
    "Pipeline",
    "Trained",
    "UNet2D",
    "cache_latents",
    "checkpoint_gradients",
    "denoiser_around",
    "encode_prompts",
    "frozen_copy",
    "lora",
    "lora_state",
    "open_generator",
    "open_latents",
    "read_captions",
    "read_prompts",
    "store_prompts",
    "vp",
]
