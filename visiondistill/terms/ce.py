"""Cross-entropy with the label."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from visiondistill.losses.common import lift
from visiondistill.terms.base import Needs, Term, View


class CE(Term):
    """Cross-entropy of the student with the label, or with the mixed labels of mixed images.

    A mean over labelled images.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        head: which of the student's classifiers.

    Raises:
        ValueError: label_smoothing outside [0, 1].
    """

    def __init__(self, label_smoothing: float = 0.0, head: str = "main") -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.needs = Needs(head=head, label=True, soft_label=True)

    def forward(self, view: View) -> Tensor:
        target = view.label if view.target is None else view.target.to(lift(view.logits).dtype)
        return cross_entropy(lift(view.logits), target, reduction="none", label_smoothing=self.label_smoothing)
