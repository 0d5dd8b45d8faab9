"""Distances between a student's sample and the one that its teacher made of the same noise."""

from __future__ import annotations

from torch import Tensor

from diffusion.tensors import choose, lift, per_sample, reduce, same_shape

KINDS = ("l2", "pseudo_huber")


def regression_loss(prediction: Tensor, target: Tensor, *, kind: str = "l2", reduction: str = "mean") -> Tensor:
    """Distance per sample, by means over its elements, as `dmd_loss` has them.

    Args:
        prediction: `[B, ...]`.
        target: of the same shape; no gradient.
        kind: "l2": mean squared error; "pseudo_huber": sqrt(mean squared error + c^2) - c with
            c = 0.00054 (Song and Dhariwal 2023, table 1, whose norm is ours times sqrt(elements)).

    Returns:
        Scalar, or `[B]` with `reduction="none"`; at least float32.

    Raises:
        ValueError: unknown kind or reduction, or shapes that differ.
    """
    choose("kind", kind, KINDS)
    same_shape(prediction=prediction, target=target)
    values = per_sample((lift(prediction) - lift(target).detach()).square())
    if kind == "pseudo_huber":
        c = 0.00054
        values = (values + c**2).sqrt() - c
    return reduce(values, reduction)
