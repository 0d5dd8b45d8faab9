"""What a figure was measured with: the weights, and what was done to the pixels."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from visiondistill.engine.state import fingerprint
from visiondistill.models import Network, as_network

CropMode = Literal["squash", "center"]


def weights_hash(model: nn.Module) -> str:
    """sha256 over the names and bytes of a classifier's tensors, wherever they lie.

    A `Network` has the hash of the module in it, an opened program that of the module it was made from.
    """
    inner = as_network(model).model
    return getattr(inner, "weights_hash", None) or fingerprint(inner.state_dict())


def preprocessing(
    network: Network,
    input_size: tuple[int, int, int] | None = None,
    crop_pct: float = 1.0,
    crop_mode: CropMode = "squash",
) -> dict[str, Any]:
    """What happens to an image before the classifier sees it, in timm's terms.

    Args:
        network: whose normalisation and resizing it is.
        input_size: `(C, H, W)` for a network that takes every size.
        crop_pct, crop_mode: what the data source does before: "squash" hands over the whole image
            (the network resizes it), "center" cuts the middle out of it, this share of each side.

    Raises:
        ValueError: crop_pct outside (0, 1].
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is not allowed: it is the share of each side that is kept, in (0, 1]")
    size = network.input_size if input_size is None else tuple(input_size)
    mean, std = statistics(network, None if size is None else size[0])
    return {
        "input_size": None if size is None else list(size),
        "pixels": "[0, 1]",
        "mean": mean,
        "std": std,
        "interpolation": network.interpolation,
        "antialias": True,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }


def statistics(network: Network, channels: int | None = None) -> tuple[list[float], list[float]]:
    """Mean and std per channel, in units of [0, 1] pixels; 0 and 1 for a network that does not normalise."""
    scale, shift = (buffer.double().flatten() for buffer in (network.scale, network.shift))
    # The network holds them folded, in float32: seven digits are what is left of the numbers given.
    mean, std = ([float(f"{value:.7g}") for value in values.tolist()] for values in (-shift / scale + 0.0, 1 / scale))
    if channels is not None and len(mean) == 1:
        mean, std = mean * channels, std * channels
    return mean, std
