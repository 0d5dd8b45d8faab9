"""How well samples cover a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.eval.distances import energy_distance, sliced_wasserstein
from diffusion.toys.mixture import GaussianMixture

NEAR = 4.0
"""A sample is on a mode within this many of the mode's standard deviations."""

FOUND = 0.25
"""A mode is found if at least this share of its mass is on it."""


def ring_metrics(samples: Tensor, mixture: GaussianMixture, reference: Tensor) -> dict[str, float]:
    """Coverage of a mixture's modes.

    Args:
        samples: `[N, 2]`.
        reference: true samples `[M, 2]` for the two distances.

    Returns:
        modes: how many modes hold at least a quarter of their mass within 4 standard deviations.
        on_mode: share of samples that lie so near a mode, in [0, 1].
        tv: total variation between the modes' shares of those samples and their weights; 1 if there
            are none.
        spread: within-mode standard deviation over the true one (1 = exact); nan if there are none.
        energy_distance, sliced_wasserstein: to the reference, see `diffusion.eval`.
    """
    distance, nearest = torch.cdist(samples, mixture.means).min(1)
    near = distance < NEAR * mixture.std
    counts = torch.bincount(nearest[near], minlength=len(mixture.weights)).to(samples.dtype)
    found = counts / len(samples) >= FOUND * mixture.weights
    tv = (counts / counts.sum() - mixture.weights).abs().sum() / 2 if near.any() else torch.ones(())
    spread = (samples - mixture.means[nearest])[near].square().mean().sqrt() / mixture.std
    return {
        "modes": int(found.sum()),
        "on_mode": float(near.float().mean()),
        "tv": float(tv),
        "spread": float(spread),
        "energy_distance": energy_distance(samples, reference),
        "sliced_wasserstein": sliced_wasserstein(samples, reference),
    }
