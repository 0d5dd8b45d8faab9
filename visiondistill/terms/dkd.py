"""Decoupled knowledge distillation; see `losses.dkd_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.common import positive_temperature
from visiondistill.losses.dkd import dkd_loss
from visiondistill.losses.standardize import standardize_logits
from visiondistill.terms.base import Needs, Term, View


class DKD(Term):
    """The teacher's target-class and non-target-class knowledge, weighted apart.

    Args:
        alpha, beta: of the target-class and the non-target-class part.
        temperature: T > 0, divides both logits.
        standardize: z-score both logits first (Sun et al. 2024).
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
        head: str = "main",
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.standardize = alpha, beta, standardize
        self.temperature = positive_temperature(temperature)
        self.needs = Needs(head=head, label=True, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        student, teacher = view.logits, view.teacher_logits
        if self.standardize:
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        return dkd_loss(student, teacher, view.label, self.alpha, self.beta, self.temperature, reduction="none")
