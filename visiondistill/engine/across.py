"""Collectives for losses and hooks: differentiable, traceable, the identity on one process.

With them a loss may be a function of the *global* batch. The engine averages gradients over
processes, so a loss that every process computes on the gathered batch has the gradient of one
process on the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

# The older name warns where the newer one exists.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Collective(torch.autograd.Function):
    """A linear collective that `torch.func` may transform, its backward pass too: that consists of others like it."""

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing: a linear function's gradient does not depend on its input."""


class _Sum(_Collective):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _ready(collectives.all_reduce(x.contiguous(), "sum", dist.group.WORLD))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class _Gather(_Collective):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _ready(_all_gather(x.contiguous(), 0, dist.group.WORLD))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        rows = gradient.shape[0] // dist.get_world_size()
        whole = _Sum.apply(gradient)
        return whole[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def gather_across(x: Tensor) -> Tensor:
    """Rows of all processes, `[B, ...] -> [processes * B, ...]`, in rank order."""
    return _Gather.apply(x) if process_count() > 1 else x


def mean_across(x: Tensor) -> Tensor:
    """Mean over processes. Use it on whatever enters nonlinearly, such as an inner gradient."""
    return _Sum.apply(x) / dist.get_world_size() if process_count() > 1 else x


def _ready(x: Tensor) -> Tensor:
    # Eager collectives hand out a tensor that waits on first use; in a graph the compiler places the wait.
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x
