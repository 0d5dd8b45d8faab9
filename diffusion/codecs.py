"""Between images and what a denoiser works on."""

from __future__ import annotations

from torch import Tensor, nn


class Codec(nn.Module):
    """Images `[B, C, H, W]` in [0, 1] to codes and back; videos have a frame axis after the batch."""

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def decode(self, codes: Tensor) -> Tensor:
        """Images, which may leave [0, 1] a little."""
        raise NotImplementedError(f"{type(self).__name__} must define decode()")

    def image_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the image whose code has this shape."""
        return shape


class Pixels(Codec):
    """Pixels themselves, moved from [0, 1] to [low, high].

    Raises:
        ValueError: not low < high.
    """

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"need low < high, got {low} and {high}")
        self.low, self.high = low, high

    def encode(self, images: Tensor) -> Tensor:
        return images * (self.high - self.low) + self.low

    def decode(self, codes: Tensor) -> Tensor:
        return (codes - self.low) / (self.high - self.low)

    def extra_repr(self) -> str:
        return f"low={self.low:g}, high={self.high:g}"


class Latents(Codec):
    """A variational autoencoder's latents, as latent diffusion models see them: (mean - shift) * scale.

    Args:
        vae: diffusers' AutoencoderKL, used in eval mode and not trained.
        scaling_factor, shift_factor: default the autoencoder's own.

    Raises:
        ValueError: an autoencoder that keeps a mean and deviation per channel, which is not supported.
    """

    def __init__(self, vae: nn.Module, scaling_factor: float | None = None, shift_factor: float | None = None) -> None:
        super().__init__()
        for name in ("latents_mean", "latents_std"):
            if getattr(vae.config, name, None) is not None:
                raise ValueError(f"{name} of {type(vae).__name__} is not supported: latents have one scale and shift")
        self.vae = vae.eval().requires_grad_(False)
        own = getattr(vae.config, "shift_factor", None) or 0.0
        self.scaling_factor = vae.config.scaling_factor if scaling_factor is None else scaling_factor
        self.shift_factor = own if shift_factor is None else shift_factor

    def train(self, mode: bool = True) -> Latents:
        super().train(mode)
        self.vae.eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """The mean of the latents, so that an image has one code; images `[B, C, H, W]`, or videos frame by frame."""
        flat = images.flatten(0, -4).to(self.vae.dtype)
        latents = self.vae.encode(flat * 2 - 1).latent_dist.mode()
        return ((latents - self.shift_factor) * self.scaling_factor).unflatten(0, images.shape[:-3]).to(images.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        flat = codes.flatten(0, -4).to(self.vae.dtype)
        images = self.vae.decode(flat / self.scaling_factor + self.shift_factor).sample
        return (images / 2 + 0.5).unflatten(0, codes.shape[:-3]).to(codes.dtype)

    def image_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        *frames, _, height, width = shape
        return (*frames, self.vae.config.out_channels, height * factor, width * factor)

    def extra_repr(self) -> str:
        return f"scaling_factor={self.scaling_factor}, shift_factor={self.shift_factor}"
