"""Shape and precision rules that every part of the package shares."""

from __future__ import annotations

import torch
from torch import Tensor

Time = Tensor | float | int
"""`[B]`, `[B, F]`, a 0-d tensor or a number: leads the batch, broadcasts over the rest."""


def lead(value: Time, x: Tensor) -> Time:
    """Reshape `value` so that its dimensions line up with the *first* ones of `x`; numbers and 0-d tensors stay.

    Raises:
        ValueError: `value` has more dimensions than `x`.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim > x.ndim:
        raise ValueError(f"a value of shape {tuple(value.shape)} cannot lead a tensor of shape {tuple(x.shape)}")
    return value.to(x.device).reshape(value.shape + (1,) * (x.ndim - value.ndim))


def as_tensor(value: Time, device: torch.device) -> Tensor:
    """Tensors keep their dtype; a number becomes float64 or int64, losing no digit."""
    if isinstance(value, Tensor):
        return value.to(device)
    # Filled there, not copied there: a copy would wait for the device.
    return torch.full((), value, dtype=torch.int64 if isinstance(value, int) else torch.float64, device=device)


def expand_time(t: Time, x: Tensor) -> Tensor:
    """t as a network takes it: `[B]` or `[B, F]`, floats at the precision of x but at least float32."""
    t = as_tensor(t, x.device)
    if t.is_floating_point():
        t = t.to(lift(x).dtype)
    return t.expand(x.shape[0]) if t.ndim == 0 else t


def factor(value: Time, x: Tensor) -> Time:
    """`value` as a constant that multiplies `x`: it leads x, has x's dtype and carries no gradient."""
    return lead(value.detach().to(x.dtype), x) if isinstance(value, Tensor) else value


def lift(x: Tensor) -> Tensor:
    """At least float32: half precision is lifted, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample(values: Tensor) -> Tensor:
    """Mean over everything but the batch, `[B, ...] -> [B]`."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def reduce(values: Tensor, reduction: str) -> Tensor:
    """`[B]` as it is ("none") or its mean ("mean")."""
    choose("reduction", reduction, ("mean", "none"))
    return values.mean() if reduction == "mean" else values


def same_shape(**tensors: Tensor) -> None:
    """Raise a `ValueError` that names the tensors unless all have one shape: broadcasting would hide a mistake."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal, got {shapes}")


def choose(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise a `ValueError` that names the allowed values unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: choose one of {', '.join(map(repr, allowed))}")
