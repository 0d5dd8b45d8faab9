"""Knowledge review; see `losses.hierarchical_context_loss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from visiondistill.losses.reviewkd import hierarchical_context_loss
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, Term, View

WIDEST = 512


class ReviewKD(Term):
    """Each of the teacher's stages is matched by the student's stage and all deeper ones, fused on the way up.

    Levels are pairs of stages and, deepest, both embeddings as maps of one pixel; the sum of
    `losses.hierarchical_context_loss` over the levels. The fusing modules are the player
    `<term>_fusion`, trained in the student's turn and not exported.

    The released code reads the teacher's features before their last activation; here they are what
    the teacher's `forward_intermediates` gives, for most networks after it.

    Args:
        student_stages, teacher_stages: which stages, in pairs, from shallow to deep; counted from 0, -1 for the last.

    Raises:
        SettingsError: the two lists differ in length, or are empty.
    """

    def __init__(
        self, student_stages: Sequence[int] = (-3, -2, -1), teacher_stages: Sequence[int] = (-3, -2, -1)
    ) -> None:
        super().__init__()
        self.needs = Needs.of_pairs(student_stages, teacher_stages, student_embedding=True, teacher_embedding=True)

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        ours, theirs = student.feature_shapes(), teacher.feature_shapes()
        inputs = [*(ours[stage][0] for stage in self.needs.student_stages), student.embedding_size()]
        outputs = [*(theirs[stage][0] for stage in self.needs.teacher_stages), teacher.embedding_size()]
        width = min(WIDEST, inputs[-1])
        levels = list(zip(inputs, outputs, strict=True))
        self.players["fusion"] = nn.ModuleList(
            Fusion(before, width, after, fuses=number > 0) for number, (before, after) in enumerate(reversed(levels))
        )

    def forward(self, view: View) -> Tensor:
        ours = (*view.student_features, view.student_embedding[..., None, None])
        theirs = (*view.teacher_features, view.teacher_embedding[..., None, None])
        value, deeper = 0.0, None
        for fusion, student, teacher in zip(self.players["fusion"], reversed(ours), reversed(theirs), strict=True):
            predicted, deeper = fusion(student, deeper, teacher.shape[-2:])
            value = value + hierarchical_context_loss(predicted, teacher, reduction="none")
        return value


class Fusion(nn.Module):
    """One level: the student's map joined with what came from below, and the prediction of the teacher's map.

    Args:
        before: channels of the student's map.
        width: within.
        after: channels of the teacher's map.
        fuses: False for the deepest level.
    """

    def __init__(self, before: int, width: int, after: int, fuses: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width))
        self.leave = nn.Sequential(nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        for convolution in (self.enter[0], self.leave[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The prediction `[B, after, *size]`, and what the next level joins, `[B, width, *size]`."""
        own = self.enter(feature)
        if self.attend is not None:
            deeper = interpolate(deeper, own.shape[-2:], mode="nearest")
            shares = self.attend(torch.cat([own, deeper], 1))
            own = own * shares[:, :1] + deeper * shares[:, 1:]
        if own.shape[-2:] != torch.Size(size):
            own = interpolate(own, tuple(size), mode="nearest")
        return self.leave(own), own
