"""Balanced divergences, a reconstruction; see `losses.balanced_divergence_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.balanced import balanced_divergence_loss
from visiondistill.losses.common import positive_temperature
from visiondistill.terms.base import Needs, Term, View


class BalancedDivergence(Term):
    """Cross-entropy with forward and reverse divergence, weighted by which network is the more confident.

    As published the teacher learns too (`teachers.Online`); with a fixed teacher it works alike.

    Args:
        delta: weight > 0 of the divergence that counts more in a row; the other has 1.
        temperature: T > 0, divides both logits.

    Raises:
        ValueError: delta or T <= 0.
    """

    def __init__(self, delta: float = 2.0, temperature: float = 4.0) -> None:
        super().__init__()
        if not delta > 0:
            raise ValueError(f"delta must be > 0, got {delta}")
        self.delta, self.temperature = delta, positive_temperature(temperature)
        self.needs = Needs(label=True, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        return balanced_divergence_loss(
            view.logits, view.teacher_logits, view.label, self.delta, self.temperature, reduction="none"
        )
