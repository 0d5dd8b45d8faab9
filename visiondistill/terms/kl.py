"""Hinton's distillation; see `losses.kd_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.common import positive_temperature
from visiondistill.losses.kd import kd_loss
from visiondistill.terms.base import Needs, Term, View


class KL(Term):
    """`T^2 KL(teacher || student)` on all images, with or without labels.

    Args:
        temperature: T > 0, divides both logits.
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(self, temperature: float = 4.0, head: str = "main") -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)
        self.needs = Needs(head=head, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        return kd_loss(view.logits, view.teacher_logits, self.temperature, reduction="none")
