"""Mixtures of isotropic Gaussians: samples, and the exact posterior mean on any noise path."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.process import Process
from diffusion.tensors import lead


class GaussianMixture(nn.Module):
    """sum_k weights[k] * N(means[k], std^2 I).

    Args:
        means: `[K, D]`.
        weights: `[K]`, positive; normalised to sum 1.
        std: of every component along every axis.

    Raises:
        ValueError: shapes do not match, a weight is not positive, or std <= 0.
    """

    means: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, weights: Tensor, std: float) -> None:
        super().__init__()
        if means.ndim != 2 or weights.shape != means.shape[:1] or (weights <= 0).any() or std <= 0:
            raise ValueError("need means [K, D], positive weights [K] and std > 0")
        self.std = std
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("weights", weights / weights.sum(), persistent=False)

    def sample(self, u: Tensor, noise: Tensor) -> Tensor:
        """Samples `[B, D]` from uniform draws `[B]` (which component) and unit noise `[B, D]`."""
        component = torch.bucketize(u, self.weights.cumsum(0)[:-1], right=True)
        return self.means[component] + self.std * noise

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] for x_t = alpha*x0 + sigma*noise: `[B, D]` and coefficients `[B]` to `[B, D]`."""
        alpha, sigma = lead(alpha.to(x_t.dtype), x_t), lead(sigma.to(x_t.dtype), x_t)
        means, weights = self.means.to(x_t.dtype), self.weights.to(x_t.dtype)
        variance = (alpha * self.std) ** 2 + sigma**2
        offset = x_t.unsqueeze(1) - alpha.unsqueeze(1) * means
        logits = weights.log() - offset.square().sum(-1) / (2 * variance)
        shrunk = means + (alpha * self.std**2 / variance).unsqueeze(1) * offset
        return (logits.softmax(1).unsqueeze(-1) * shrunk).sum(1)


class _Posterior(nn.Module):
    def __init__(self, mixture: GaussianMixture, process: Process) -> None:
        super().__init__()
        self.mixture, self.process = mixture, process

    def forward(self, x_t: Tensor, t: Tensor, condition: None = None) -> Tensor:
        return self.mixture.posterior_mean(x_t, self.process.alpha(t), self.process.sigma(t))


def exact_denoiser(mixture: GaussianMixture, process: Process) -> Denoiser:
    """The perfect denoiser of the mixture on a path."""
    return Denoiser(_Posterior(mixture, process), process, "x0")


def ring(modes: int = 8, radius: float = 0.7, std: float = 0.04) -> GaussianMixture:
    """Gaussians on a circle with weights 1:2 alternating; per-axis standard deviation 0.5 at the defaults."""
    angle = 2 * math.pi * torch.arange(modes) / modes
    weights = 1.0 + torch.arange(modes) % 2
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), weights, std)
