"""The interface of a term: what it needs, what it sees, what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Carry
from visiondistill.parts import Part


@dataclass(frozen=True)
class Needs:
    """What a term reads; nothing else is computed for it.

    Args:
        head: which of the student's classifiers.
        label: labels of the batch.
        soft_label: where an augmentor mixes images, the term takes their mixed labels in place of `label`.
        teacher_logits: the teacher's answer.
        student_stages, teacher_stages: features of these stages, -1 for the last.
        student_embedding, teacher_embedding: the pooled features that the classifier reads.
        per_sample: the term gives one value per row; otherwise one for the whole batch.
        peer: roles are exchanged: the term teaches an online teacher (see `terms.Peer`).
    """

    head: str = "main"
    label: bool = False
    soft_label: bool = False
    teacher_logits: bool = False
    student_stages: tuple[int, ...] = ()
    teacher_stages: tuple[int, ...] = ()
    student_embedding: bool = False
    teacher_embedding: bool = False
    per_sample: bool = True
    peer: bool = False

    @classmethod
    def of_pairs(cls, student_stages: Sequence[int], teacher_stages: Sequence[int], **others: Any) -> Needs:
        """Features of stages that are compared one with one.

        Raises:
            SettingsError: the two lists differ in length, or are empty.
        """
        if len(student_stages) != len(teacher_stages) or not student_stages:
            raise SettingsError(f"stages come in pairs, got {list(student_stages)} and {list(teacher_stages)}")
        return cls(student_stages=tuple(student_stages), teacher_stages=tuple(teacher_stages), **others)


@dataclass
class View:
    """What a term sees of one micro-batch; what it does not need is None.

    Args:
        logits: the student's `[B, K]`, from the head that the term asked for.
        label: int64 `[B]`, all valid classes; None where an augmentor mixed them.
        target: mixed labels `[B, K]`, rows of sum 1; None where labels are not mixed.
        teacher_logits: `[B, K]`.
        student_features, teacher_features: `[B, C, H, W]` of each stage, in the order that was asked for.
        student_prefixes: `[B, n, C]` of the same stages, the class and register tokens; None for other models.
        student_embedding, teacher_embedding: `[B, D]`.
        batch: the whole batch, for what the term's own `prepare` added.
        carry: the term may add tensors here for its `after`.
    """

    logits: Tensor
    batch: Batch
    label: Tensor | None = None
    target: Tensor | None = None
    teacher_logits: Tensor | None = None
    student_features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()
    student_prefixes: tuple[Tensor | None, ...] = ()
    student_embedding: Tensor | None = None
    teacher_embedding: Tensor | None = None
    carry: Carry = field(default_factory=dict)


class Term(Part):
    """One thing that is matched, unweighted. Set `needs` in the constructor and define `forward`."""

    needs: Needs

    def forward(self, view: View) -> Tensor:
        """One value per row, `[B]`, or a scalar where `needs.per_sample` is False."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")
