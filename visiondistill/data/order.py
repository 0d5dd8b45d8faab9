"""The order of samples as a pure function of the seed."""

from __future__ import annotations

import torch
from torch import Tensor

from visiondistill.engine.rng import key


class EpochOrder:
    """Permutations of `range(length)`, one per epoch, laid end to end.

    Place `p` of the endless sequence belongs to epoch `p // length`, so every sample comes exactly
    once per epoch, whatever the batch size, the step that reading starts from, or how the places
    are shared out over processes.

    Args:
        length: samples in the set, at least 1.
        seed: decides every permutation; the same on all machines and devices.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._recent: dict[int, Tensor] = {}

    def epoch(self, number: int) -> Tensor:
        """The permutation of one epoch, int64 `[length]`."""
        if number not in self._recent:
            generator = torch.Generator().manual_seed(key(self.seed, "epoch", number))
            self._recent = {n: order for n, order in self._recent.items() if n == number - 1}
            self._recent[number] = torch.randperm(self.length, generator=generator)
        return self._recent[number]

    def between(self, first: int, last: int) -> Tensor:
        """Sample indices of places `first` to `last` (exclusive), int64 `[last - first]`."""
        parts = []
        while first < last:
            epoch, start = divmod(first, self.length)
            stop = min(self.length, start + last - first)
            parts.append(self.epoch(epoch)[start:stop])
            first += stop - start
        return torch.cat(parts)
