"""Divergences of logits, class by class; see `losses.binary_kl_norm_loss`."""

from __future__ import annotations

from torch import Tensor

from visiondistill.losses.binary_kl import binary_kl_loss, binary_kl_norm_loss
from visiondistill.losses.common import positive_temperature
from visiondistill.terms.base import Needs, Term, View


class BinaryKL(Term):
    """Matches raw logits, summed over classes: about K times larger than a mean.

    Args:
        temperature: T > 0, divides both logits.
        norm: compare the difference of logits with 0 (both released training scripts do), rather
            than the two sigmoids.
        head: which of the student's classifiers.

    Raises:
        ValueError: T <= 0.
    """

    def __init__(self, temperature: float = 2.0, norm: bool = True, head: str = "main") -> None:
        super().__init__()
        self.temperature, self.norm = positive_temperature(temperature), norm
        self.needs = Needs(head=head, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        loss = binary_kl_norm_loss if self.norm else binary_kl_loss
        return loss(view.logits, view.teacher_logits, self.temperature, reduction="none")
