"""Regression on a denoising target: teachers, critics, degradation paths."""

from __future__ import annotations

from torch import Tensor

from diffusion.tensors import Time, choose, factor, lift, per_sample, reduce, same_shape

TARGETS = ("x0", "eps", "v", "velocity")


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor | None = None,
    *,
    prediction_type: str = "x0",
    alpha: Time | None = None,
    sigma: Time | None = None,
    weight: Time | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean within each sample of weight*(prediction - target)^2.

    Args:
        prediction: `[B, ...]`.
        x0: clean samples, detached.
        noise: unit noise; needed unless the target is "x0".
        prediction_type: which target: "x0", "eps" (the noise), "v" (alpha*noise - sigma*x0) or
            "velocity" (noise - x0, on the linear path).
        alpha, sigma: `[B]` or broadcastable; needed for "v".
        weight: `[B]` or broadcastable, such as `edm_loss_weight(sigma)` for "x0".

    Returns:
        Scalar, or `[B]` with `reduction="none"`; at least float32.

    Raises:
        ValueError: unknown prediction type or reduction, shapes that differ, or a missing input.
    """
    same_shape(prediction=prediction, x0=x0, noise=x0 if noise is None else noise)
    target = _target(lift(x0), noise, prediction_type, alpha, sigma).detach()
    squares = (lift(prediction) - target) ** 2
    if weight is not None:
        squares = squares * factor(weight, squares)
    return reduce(per_sample(squares), reduction)


def edm_loss_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(sigma^2 + sigma_data^2)/(sigma*sigma_data)^2, of sigma's shape. Source: Karras et al. 2022, table 1."""
    return sigma**-2 + sigma_data**-2


def _target(x0: Tensor, noise: Tensor | None, prediction_type: str, alpha: Time | None, sigma: Time | None) -> Tensor:
    choose("prediction_type", prediction_type, TARGETS)
    if prediction_type == "x0":
        return x0
    if noise is None:
        raise ValueError(f"prediction_type={prediction_type!r} needs noise; only 'x0' does without")
    if prediction_type == "eps":
        return lift(noise)
    if prediction_type == "velocity":
        return lift(noise) - x0
    if alpha is None or sigma is None:
        raise ValueError("prediction_type='v' needs alpha and sigma")
    return factor(alpha, x0) * lift(noise) - factor(sigma, x0) * x0
