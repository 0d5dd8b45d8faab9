"""torch.compile as the engine uses it: one graph per turn, frozen networks on their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from visiondistill.engine.settings import Run


def compiler_settings() -> AbstractContextManager[None]:
    """Context manager: the compiler settings that turns need, for the length of a run."""
    import torch._dynamo  # takes seconds, and only a compiled run needs it
    import torch._functorch.config

    stack = ExitStack()
    # Bilevel turns call `autograd.grad` inside the graph.
    stack.enter_context(torch._dynamo.config.patch(trace_autograd_ops=True))
    # A turn under DDP stays one graph: gradients arrive together at its end, there is nothing to overlap.
    stack.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
    # Proof of learning and `combine` walk a graph's backward more than once.
    stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
    return stack


def compiled(function: Callable, run: Run) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=run.compile_backend)


class FrozenCompiled:
    """Frozen networks compiled in place while a stage runs."""

    def __init__(self, networks: Iterable[nn.Module], run: Run) -> None:
        self.networks = list(networks) if run.compile else []
        for network in self.networks:
            network.compile(dynamic=False, backend=run.compile_backend)

    def release(self) -> None:
        for network in self.networks:
            network._compiled_call_impl = None
