"""Plackett-Luce distillation; see `losses.pld_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.common import positive_temperature
from visiondistill.losses.pld import pld_loss
from visiondistill.terms.base import Needs, Term, View


class PLD(Term):
    """The label first, then the other classes in the teacher's order; no further term is needed.

    Args:
        temperature: T > 0 of the teacher's probabilities, which weight the choices.
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(self, temperature: float = 1.0, head: str = "main") -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)
        self.needs = Needs(head=head, label=True, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        return pld_loss(view.logits, view.teacher_logits, view.label, self.temperature, reduction="none")
