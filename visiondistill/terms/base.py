"""The interface of a term: what it needs, what it sees, what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from visiondistill.engine.method import Batch, Carry
from visiondistill.models.network import Network
from visiondistill.parts import Part
from visiondistill.teachers.base import Teacher


@dataclass(frozen=True)
class Needs:
    """What a term reads; nothing else is computed for it.

    Args:
        head: which of the student's classifiers.
        label: labels of the batch.
        soft_label: where an augmentor mixes images, the term takes their mixed labels in place of `label`.
        teacher_logits: the teacher's answer.
        student_stage, teacher_stage: features of one stage each, -1 for the last.
        per_sample: the term gives one value per row; otherwise one for the whole batch.
    """

    head: str = "main"
    label: bool = False
    soft_label: bool = False
    teacher_logits: bool = False
    student_stage: int | None = None
    teacher_stage: int | None = None
    per_sample: bool = True


@dataclass
class View:
    """What a term sees of one micro-batch; what it does not need is None.

    Args:
        logits: the student's `[B, K]`, from the head that the term asked for.
        label: int64 `[B]`, all valid classes; None where an augmentor mixed them.
        target: mixed labels `[B, K]`, rows of sum 1; None where labels are not mixed.
        teacher_logits: `[B, K]`.
        student_feature, teacher_feature: `[B, C, H, W]`.
        batch: the whole batch, for what the term's own `prepare` added.
        carry: the term may add tensors here for its `after`.
    """

    logits: Tensor
    label: Tensor | None
    teacher_logits: Tensor | None
    student_feature: Tensor | None
    teacher_feature: Tensor | None
    batch: Batch
    target: Tensor | None = None
    carry: Carry = field(default_factory=dict)


class Term(Part):
    """One thing that is matched, unweighted. Set `needs` in the constructor and define `forward`."""

    needs: Needs

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        """Build whatever depends on the networks' shapes, such as regressors; they become players."""

    def forward(self, view: View) -> Tensor:
        """One value per row, `[B]`, or a scalar where `needs.per_sample` is False."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")
