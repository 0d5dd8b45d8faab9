"""Relational knowledge distillation; see `losses.rkd_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.engine.across import gather_across
from visiondistill.losses.rkd import rkd_loss
from visiondistill.terms.base import Needs, Term, View


class RKD(Term):
    """Distances and angles between the embeddings of the whole global batch (B^3 angles of B images).

    Args:
        distance_weight, angle_weight: of the two parts.
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.needs = Needs(student_embedding=True, teacher_embedding=True, per_sample=False)

    def forward(self, view: View) -> Tensor:
        student, teacher = gather_across(view.student_embedding), gather_across(view.teacher_embedding)
        return rkd_loss(student, teacher, self.distance_weight, self.angle_weight)
