"""Gradient alignment of two groups of terms.

Yang, Zong, Huang, Feng, An: Dual-Head Knowledge Distillation, KDD 2025, arXiv 2411.08937: where the teacher's
gradient points against the label's, its component along it is taken out. As in the released code the vector holds
every parameter, also the label's own classifier, whose update a conflict therefore lengthens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Terms
from visiondistill.terms.base import View
from visiondistill.weighting.fixed import Fixed, Ramp

LABEL, TEACHER = "label", "teacher"


class Aligned(Fixed):
    """Fixed weights; where the other terms' gradient g opposes the label terms' l, g loses its part along l.

    Over all parameters that the turn moves, joined into one vector: `g - min(<g, l>, 0) / |l|^2 l`.
    The label terms' gradient is never changed. It takes one backward pass per group.

    Args:
        weights: as of `Fixed`.
        label: the terms that are left alone.

    Raises:
        SettingsError: one of the two groups is empty.
    """

    def __init__(self, weights: Mapping[str, float | Ramp] | None = None, label: Sequence[str] = ("ce",)) -> None:
        super().__init__(weights)
        self.label = tuple(label)

    def active(self, terms: Sequence[str]) -> list[str]:
        active = super().active(terms)
        if not set(active) & set(self.label) or not set(active) - set(self.label):
            raise SettingsError(
                f"aligning needs terms on both sides: {list(self.label)} and others; those with a weight are {active}"
            )
        return active

    def forward(self, values: dict[str, Tensor], view: View) -> Terms:
        terms = super().forward(values, view)
        return {f"{LABEL if name in self.label else TEACHER}/{name}": value for name, value in terms.items()}

    def combine(self, groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The sum of both groups' gradients, the teacher's projected where they conflict."""
        names = list(groups[LABEL])
        label, teacher = ([groups[group][name] for name in names] for group in (LABEL, TEACHER))
        product = torch.stack([(a * b).sum() for a, b in zip(label, teacher, strict=True)]).sum()
        square = torch.stack([a.square().sum() for a in label]).sum()
        along = product.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
        return {name: b + (1 - along) * a for name, a, b in zip(names, label, teacher, strict=True)}
