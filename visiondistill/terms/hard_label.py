"""The teacher's decision as a label.

Touvron, Cord, Douze, Massa, Sablayrolles, Jegou: Training data-efficient image transformers and distillation
through attention, ICML 2021, arXiv 2012.12877, the teacher's part of equation 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from visiondistill.losses.common import Reduction, paired_logits, reduce
from visiondistill.terms.base import Needs, Term, View


def hard_label_loss(
    student_logits: Tensor, teacher_logits: Tensor, label_smoothing: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy with the class that the teacher finds most probable; there is no temperature to choose.

    Args:
        student_logits, teacher_logits: `[B, K]`.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        reduction: "mean" over rows, or "none" for `[B]`.

    Raises:
        ValueError: shapes differ or unknown reduction.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    values = cross_entropy(student, teacher.argmax(1), reduction="none", label_smoothing=label_smoothing)
    return reduce(values, reduction)


class HardLabel(Term):
    """Cross-entropy with the teacher's decision on all images, with or without labels.

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
        self.needs = Needs(head=head, teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        return hard_label_loss(view.logits, view.teacher_logits, self.label_smoothing, reduction="none")
