"""Hinton's distillation; see `losses.kd_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.common import positive_temperature
from visiondistill.losses.kd import kd_loss
from visiondistill.losses.standardize import standardize_logits
from visiondistill.terms.base import Needs, Term, View


class KL(Term):
    """`T^2 KL(teacher || student)` on all images, with or without labels.

    Args:
        temperature: T > 0, divides both logits.
        standardize: z-score both logits first (Sun et al. 2024).
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(self, temperature: float = 4.0, standardize: bool = False, head: str = "main") -> None:
        super().__init__()
        self.standardize = standardize
        self.temperature = positive_temperature(temperature)
        self.needs = Needs(head=head, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        student, teacher = view.logits, view.teacher_logits
        if self.standardize:
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        return kd_loss(student, teacher, self.temperature, reduction="none")
