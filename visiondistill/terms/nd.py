"""Norm and direction; see `losses.nd_loss`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Stream
from visiondistill.losses.nd import nd_loss
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.teachers.means import class_means
from visiondistill.terms.base import Needs, Term, View


class NormDirection(Term):
    """Draws the student's embedding along its class's mean teacher embedding, up to the teacher's length.

    The means come from one pass of the teacher over the training images as an evaluation sees
    them (the released code averages over augmented ones, rounded to four decimals); they are kept
    with the run. Where the widths differ, an adapter (batch norm, dropout, linear) is the player
    `<term>_adapter`: it serves this term alone and is not exported, and unlike the released one it leaves
    the student's initial weights as they are. Mixed labels mix the means.

    Args:
        dropout: of the adapter, in [0, 1).
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = dropout
        self.needs = Needs(label=True, soft_label=True, student_embedding=True, teacher_embedding=True)

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        if teacher.online:
            raise SettingsError("class means are of a teacher that stays as it is, not of one that learns")
        if teacher.num_classes is None:
            raise SettingsError("the teacher does not say how many classes it tells apart: give it num_classes")
        ours, theirs = student.embedding_size(), teacher.embedding_size()
        if ours != theirs:
            self.players["adapter"] = nn.Sequential(
                nn.BatchNorm1d(ours), nn.Dropout(self.dropout), nn.Linear(ours, theirs)
            )
        self.register_buffer("class_means", torch.zeros(teacher.num_classes, theirs))
        self._teacher = (teacher,)

    def setup(self, streams: dict[str, Stream]) -> None:
        (teacher,) = self._teacher
        means = class_means(teacher, streams["train"].data, lambda targets: targets["embedding"], self.class_means)
        self.class_means.copy_(means)

    def forward(self, view: View) -> Tensor:
        adapter = self.players.get("adapter")
        student = view.student_embedding if adapter is None else adapter(view.student_embedding)
        if view.target is None:
            return nd_loss(student, view.teacher_embedding, self.class_means, view.label, reduction="none")
        means = view.target.to(self.class_means.dtype) @ self.class_means
        rows = torch.arange(len(means), device=means.device)
        return nd_loss(student, view.teacher_embedding, means, rows, reduction="none")
