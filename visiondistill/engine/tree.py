"""Nested dicts of tensors: what the engine does to a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` of every tensor; other leaves stay."""
    if isinstance(tree, dict):
        return {name: tree_map(function, value) for name, value in tree.items()}
    return function(tree) if isinstance(tree, Tensor) else tree


def tree_join(trees: Sequence[Any]) -> Any:
    """One tree of several of the same shape: rows concatenated, scalars averaged."""
    first = trees[0]
    if len(trees) == 1:
        return first
    if isinstance(first, dict):
        return {name: tree_join([tree[name] for tree in trees]) for name in first}
    if not isinstance(first, Tensor):
        return first
    if first.ndim:
        return torch.cat(list(trees))
    # A number that is not a measurement (an index, a flag) is the same in all of them.
    return torch.stack(list(trees)).mean(0) if first.is_floating_point() else first


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """`("outer.inner", tensor)` for every tensor."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flatten(value, f"{path}.")
        elif isinstance(value, Tensor):
            yield path, value
