"""Images that are changed in the latent space of a pretrained autoencoder.

After "unconstrained image edits through a pretrained VAE" of HARD's abstract (arXiv 2305.14890);
the net, its bound and the kind of autoencoder are a reconstruction.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.augmentors.edits import Edit, zeroed
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import Draw

KIND = "AutoencoderKL"


class LatentEdit(Edit):
    """Encodes each image, adds what a small net reads in the latents z and in noise, and decodes the sum.

    The residual is `bound * rms(z) * tanh(net)`, rms over the image's own latents, so that its norm
    is at most `bound` times theirs. The net's last layer is 0 at first: images are then what the
    autoencoder makes of them. Its gradient comes through the decoder; the encoder is asked once a
    step, without gradients, for the mean of its distribution.

    Args:
        vae: folder of a diffusers AutoencoderKL with safetensors, such as `vae` in that of a pipeline.
            Needs the extra "diffusion". It stays as it is, and no checkpoint holds it.
        bound: > 0, see above.
        width: of the net.

    Raises:
        ValueError: a bound outside its range, or a folder that holds no whole AutoencoderKL.
        SettingsError: diffusers is not installed.
    """

    def __init__(self, vae: str, bound: float = 0.3, width: int = 32) -> None:
        super().__init__()
        if not 0 < bound < math.inf:
            raise ValueError(f"need bound > 0, got {bound}: the residual's norm as a share of the latents'")
        self.bound = bound
        self.frozen["vae"] = _autoencoder(Path(vae)).eval().requires_grad_(False)
        config = self.frozen["vae"].config
        self.channels, self.factor = config.in_channels, 2 ** (len(config.block_out_channels) - 1)
        self.net = nn.Sequential(
            nn.Conv2d(config.latent_channels + 1, width, 3, padding=1),
            nn.GroupNorm(1, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            zeroed(nn.Conv2d(width, config.latent_channels, 1)),
        )

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Latents `[B, L, H / factor, W / factor]`, as the autoencoder gives them: neither shifted nor scaled.

        Raises:
            SettingsError: images of other channels, or of sides that are no multiples of the factor.
        """
        self._cells(image)
        return self.frozen["vae"].encode(2 * image - 1).latent_dist.mode()

    def noise(self, image: Tensor, draw: Draw, tag: str) -> Tensor:
        return draw.normal(tag, 1, *self._cells(image))

    def numbers(self, code: Tensor, noise: Tensor, partner: Tensor) -> Tensor:
        """`[B, L, H / factor, W / factor]` in [-1, 1]: the residual by its bound."""
        return self.net(torch.cat([code / _rms(code), noise.to(code.dtype)], 1)).tanh()

    def forward(self, code: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        changed = code + self.bound * _rms(code) * self.numbers(code, noise, partner)
        image = self.frozen["vae"].decode(changed).sample / 2 + 0.5
        return image.clamp(0, 1), torch.ones_like(image[:, 0, 0, 0])

    def _cells(self, image: Tensor) -> tuple[int, int]:
        channels, height, width = image.shape[1:]
        if channels != self.channels:
            raise SettingsError(f"vae: it takes {self.channels} channels, the images have {channels}: take another one")
        if height % self.factor or width % self.factor:
            raise SettingsError(
                f"vae: it makes a cell of {self.factor} x {self.factor} pixels, and the images are {height} x {width}: "
                f"choose a data size whose sides are multiples of {self.factor}, or another autoencoder"
            )
        return height // self.factor, width // self.factor


def _rms(code: Tensor) -> Tensor:
    """`[B, 1, 1, 1]`."""
    return code.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)


def _autoencoder(folder: Path) -> nn.Module:
    """In float32, every tensor of it from the folder's safetensors."""
    _check_kind(folder)
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise SettingsError(f"vae: it needs diffusers: pip install 'visiondistill[diffusion]' ({error})") from error
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        vae, told = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"vae: {folder} cannot be loaded: {error}; it must hold diffusion_pytorch_model.safetensors, whole"
        ) from error
    for kind in ("missing", "mismatched", "unexpected"):
        if keys := sorted(map(str, told[f"{kind}_keys"])):
            raise ValueError(f"vae: {folder}: {len(keys)} {kind} tensors, such as {keys[0]}: fetch the folder again")
    return vae


def _check_kind(folder: Path) -> None:
    """Before diffusers is asked, which takes a path that is not there for a name on a hub."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"vae: {file} is missing: name the folder of a diffusers {KIND}; a pipeline has one in `vae`")
    try:
        kind = json.loads(file.read_text("utf-8")).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"vae: {file} is no config ({error}): fetch the folder again") from error
    if kind != KIND:
        raise ValueError(f"vae: {folder} holds {kind!r}: only a diffusers {KIND} is supported")
