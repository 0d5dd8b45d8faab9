"""Attention transfer; see `losses.attention_transfer_loss`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visiondistill.losses.attention import attention_transfer_loss
from visiondistill.terms.base import Needs, Term, View


class AttentionTransfer(Term):
    """Matches where features are large, stage by stage; the sum over the stages.

    Args:
        student_stages, teacher_stages: which stages, in pairs; counted from 0, -1 for the last.
        p: even power of the features.

    Raises:
        SettingsError: the two lists differ in length, or are empty.
    """

    def __init__(
        self,
        student_stages: Sequence[int] = (-3, -2, -1),
        teacher_stages: Sequence[int] = (-3, -2, -1),
        p: int = 2,
    ) -> None:
        super().__init__()
        self.p = p
        self.needs = Needs.of_pairs(student_stages, teacher_stages)

    def forward(self, view: View) -> Tensor:
        pairs = zip(view.student_features, view.teacher_features, strict=True)
        return sum(attention_transfer_loss(ours, theirs, self.p, reduction="none") for ours, theirs in pairs)
