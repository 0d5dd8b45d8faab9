"""Optimal transport between predictions; see `losses.sinkhorn_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.engine.across import gather_across
from visiondistill.losses.common import positive_temperature
from visiondistill.losses.sinkhorn import sinkhorn_loss
from visiondistill.terms.base import Needs, Term, View


class Sinkhorn(Term):
    """Transport cost from the student's predictions to the teacher's, over the whole global batch.

    Args:
        temperature: T > 0, divides both logits.
        epsilon: of the entropic regularisation, > 0.
        num_iters: normalisations of rows and columns.

    Raises:
        ValueError: T or epsilon <= 0.
    """

    def __init__(self, temperature: float = 2.0, epsilon: float = 0.1, num_iters: int = 20) -> None:
        super().__init__()
        if not epsilon > 0 or num_iters < 1:
            raise ValueError(f"need epsilon > 0 and num_iters >= 1, got {epsilon} and {num_iters}")
        self.temperature, self.epsilon, self.num_iters = positive_temperature(temperature), epsilon, num_iters
        self.needs = Needs(teacher_logits=True, per_sample=False)

    def forward(self, view: View) -> Tensor:
        student, teacher = gather_across(view.logits), gather_across(view.teacher_logits)
        return sinkhorn_loss(student, teacher, self.temperature, self.epsilon, self.num_iters)
