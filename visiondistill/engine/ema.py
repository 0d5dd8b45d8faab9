"""The moving average of the product.

timm's ModelEmaV3 averages in the model's own precision and knows no gate on the device; here the
shadow is at least fp32 and an update that the guard refused leaves it alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """fp32 (or finer) shadow of the product's trainable parameters and of its running statistics.

    Args:
        product: what is followed. Parameters that do not require gradients are not averaged.
        decay: weight of the past in one update, in [0, 1).
        warmup: use min(decay, (1 + n) / (10 + n)) at the n-th update that happened, counted from 0.

    Attributes:
        updates: of the product that happened, 0-d on its device.
    """

    def __init__(self, product: nn.Module, decay: float, warmup: bool = False) -> None:
        self.product, self.decay, self.warmup = product, decay, warmup
        self.live: list[Tensor] = []
        self.names: list[str] = []
        self.follow()
        self.values = [t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in self.live]
        self.updates = torch.zeros((), device=self.live[0].device)

    def follow(self) -> None:
        """Find the product's tensors, again after something replaced them."""
        kept = self.product.state_dict(keep_vars=True)
        averaged = {
            name: tensor
            for name, tensor in kept.items()
            if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
        }
        self.names, self.live = list(averaged), list(averaged.values())

    def decay_at(self, update: Tensor) -> Tensor | float:
        """The decay of an update by its number (0-d, from 0)."""
        return ((1 + update) / (10 + update)).clamp(max=self.decay) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, hold: Tensor) -> None:
        """Follow the product after an update, unless `hold` (0-d, 0 or 1) is set: then there was none."""
        happened = 1 - hold
        weight = happened * (1 - self.decay_at(self.updates))
        self.updates.add_(happened)
        change = torch._foreach_sub(self.live, self.values)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self.values, change)

    def module(self) -> nn.Module:
        """A copy of the product, in eval mode, that holds the averaged weights."""
        averaged = copy.deepcopy(self.product).eval().requires_grad_(False)
        own = averaged.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in zip(self.names, self.values, strict=True):
                own[name].copy_(value)
        return averaged
