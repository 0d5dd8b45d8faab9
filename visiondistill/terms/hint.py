"""FitNet hints; see `losses.hint_loss`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from visiondistill.losses.hint import hint_loss
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, Term, View


class Hint(Term):
    """A 1x1 convolution predicts the teacher's feature map from the student's; mean squared error.

    The convolution is the player `<term>_regressor`, trained in the student's turn and not
    exported. The map of higher resolution is averaged down to the other's.

    Args:
        student_stage, teacher_stage: which stages, counted from 0, -1 for the last.
    """

    def __init__(self, student_stage: int = -1, teacher_stage: int = -1) -> None:
        super().__init__()
        self.needs = Needs(student_stages=(student_stage,), teacher_stages=(teacher_stage,))

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        student_channels = student.feature_shapes()[self.needs.student_stages[0]][0]
        teacher_channels = teacher.feature_shapes()[self.needs.teacher_stages[0]][0]
        self.players["regressor"] = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, view: View) -> Tensor:
        (ours,), (theirs,) = view.student_features, view.teacher_features
        size = [min(a, b) for a, b in zip(ours.shape[-2:], theirs.shape[-2:], strict=True)]
        predicted = self.players["regressor"](_pooled(ours, size))
        return hint_loss(predicted, _pooled(theirs, size), reduction="none")


def _pooled(feature: Tensor, size: list[int]) -> Tensor:
    return feature if list(feature.shape[-2:]) == size else adaptive_avg_pool2d(feature, size)
