"""Weights that do not depend on the data: constants, and ramps by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Terms
from visiondistill.engine.rng import Draw
from visiondistill.terms.base import View
from visiondistill.weighting.base import Weighting


@dataclass(frozen=True)
class Ramp:
    """A weight that moves linearly over steps of the stage and then stays.

    Args:
        start, end: weight before and after.
        steps: length of the ramp, at least 1.
        delay: steps before it begins.
    """

    start: float = 0.0
    end: float = 1.0
    steps: int = 1000
    delay: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.delay < 0:
            raise ValueError(f"a ramp needs steps >= 1 and delay >= 0, got {self.steps} and {self.delay}")

    def at(self, step: int) -> float:
        share = min(max((step - self.delay) / self.steps, 0.0), 1.0)
        return self.start + (self.end - self.start) * share


class Fixed(Weighting):
    """The sum of the terms with given weights.

    Args:
        weights: `{term: constant or Ramp}`; terms that are not named have weight 1. A constant of
            exactly 0 leaves its term out of the computation; a ramp that reaches 0 does not.

    Raises:
        ValueError: a weight is not finite.
    """

    def __init__(self, weights: Mapping[str, float | Ramp] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        self.ramps = {name: weight for name, weight in self.weights.items() if isinstance(weight, Ramp)}
        for name, weight in self.weights.items():
            ends = (weight.start, weight.end) if isinstance(weight, Ramp) else (weight,)
            if not all(map(math.isfinite, ends)):
                raise ValueError(f"the weight of term '{name}' must be finite, got {weight}")

    def active(self, terms: Sequence[str]) -> list[str]:
        unknown = sorted(set(self.weights) - set(terms))
        if unknown:
            raise SettingsError(f"weights are given for {unknown}; the terms are {sorted(terms)}")
        return [name for name in terms if self.weights.get(name, 1.0) != 0]

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        if not self.ramps:
            return batch
        # As tensors: a number that changes every step would compile a graph for each.
        now = {
            name: torch.full((), ramp.at(draw.step), dtype=draw.dtype, device=draw.device)
            for name, ramp in self.ramps.items()
        }
        return batch | {"weights": now}

    def forward(self, values: dict[str, Tensor], view: View) -> Terms:
        return {name: self._weight(name, view.batch) * value.mean() for name, value in values.items()}

    def _weight(self, name: str, batch: Batch) -> float | Tensor:
        return batch["weights"][name] if name in self.ramps else self.weights.get(name, 1.0)
