"""Distillation from a stronger teacher; see `losses.dist_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.engine.across import gather_across
from visiondistill.losses.common import positive_temperature
from visiondistill.losses.dist import dist_loss
from visiondistill.terms.base import Needs, Term, View


class DIST(Term):
    """Correlation with the teacher: of classes within an image, and of images within a class.

    The second is a function of the whole batch: rows of all processes are gathered, and the batch
    is not split into micro-batches.

    Args:
        beta, gamma: weights of the two.
        temperature: T > 0, divides both logits.
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, head: str = "main") -> None:
        super().__init__()
        self.beta, self.gamma = beta, gamma
        self.temperature = positive_temperature(temperature)
        self.needs = Needs(head=head, teacher_logits=True, per_sample=False)

    def forward(self, view: View) -> Tensor:
        student, teacher = gather_across(view.logits), gather_across(view.teacher_logits)
        return dist_loss(student, teacher, self.beta, self.gamma, self.temperature)
