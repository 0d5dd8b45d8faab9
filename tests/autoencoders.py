"""Autoencoders as other people make them: by diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def toy_vae(folder: Path, **changes: Any) -> str:
    """A folder with an AutoencoderKL of three channels that makes a cell of 4 x 4 pixels; random weights."""
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (4, 4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 2,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**settings | changes).save_pretrained(folder)
    return str(folder)
