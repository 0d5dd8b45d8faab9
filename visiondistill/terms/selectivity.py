"""Neuron selectivity transfer.

Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv 1707.01219,
equation 3, with its polynomial kernel of degree 2 and no constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visiondistill.losses.common import Reduction, maps_of_one_size, reduce
from visiondistill.terms.base import Needs, Term, View


def selectivity_loss(student_feature: Tensor, teacher_feature: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared maximum mean discrepancy between two sets of neurons, by where in an image each of them responds.

    A neuron is the map of one channel, as a unit vector over the positions. With the squared inner product as kernel
    the discrepancy is the squared distance between the means, over channels, of the maps' outer products, and so is
    it computed: at a cost that does not grow with the product of channels, and never below 0. Order, sign and size of
    channels change nothing. The larger map is averaged down to the smaller one. The value is at most 2.

    Args:
        student_feature, teacher_feature: `[B, C, H, W]`; channels and sizes may differ.
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: batch sizes differ, or unknown reduction.
    """
    student, teacher = maps_of_one_size(student_feature, teacher_feature)
    difference = _together(student) - _together(teacher)
    return reduce(difference.square().sum((1, 2)), reduction)


def _together(feature: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H * W, H * W]`: how much two positions have the same neurons respond."""
    maps = normalize(feature.flatten(2), dim=2)
    # Autocast would round products, whose differences are small.
    with torch.autocast(maps.device.type, enabled=False):
        return maps.mT @ maps / maps.shape[1]


class NeuronSelectivity(Term):
    """Where neurons respond, stage by stage; the sum over the stages.

    Args:
        student_stages, teacher_stages: which stages, in pairs; counted from 0, -1 for the last.

    Raises:
        SettingsError: the two lists differ in length, or are empty.
    """

    def __init__(self, student_stages: Sequence[int] = (-1,), teacher_stages: Sequence[int] = (-1,)) -> None:
        super().__init__()
        self.needs = Needs.of_pairs(student_stages, teacher_stages)

    def forward(self, view: View) -> Tensor:
        pairs = zip(view.student_features, view.teacher_features, strict=True)
        return sum(selectivity_loss(ours, theirs, reduction="none") for ours, theirs in pairs)
