"""FitNet hints; see `losses.hint_loss`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from visiondistill.engine.errors import SettingsError
from visiondistill.losses.hint import hint_loss
from visiondistill.models.network import Network, Shape
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, Term, View


class Hint(Term):
    """A regressor predicts the teacher's feature map from the student's; mean squared error.

    It is the player `<term>_regressor`, trained in the student's turn and not exported. The linear
    one is a 1x1 convolution; the map of higher resolution is averaged down to the other's. It fits
    every pair of networks, features of either sign included. The released one reproduces the
    baseline that papers compare with: a convolution chosen by the ratio of the maps' sides (3x3 with
    stride 2 for twice the teacher's, transposed 4x4 for half, unpadded of side 1 + difference for
    any other that is not smaller), batch norm, and ReLU, so that the teacher's features should
    come after a ReLU too.

    Args:
        student_stage, teacher_stage: which stages, counted from 0, -1 for the last.
        regressor: "linear" or "released".

    Raises:
        ValueError: another regressor.
    """

    def __init__(
        self,
        student_stage: int = -1,
        teacher_stage: int = -1,
        regressor: Literal["linear", "released"] = "linear",
    ) -> None:
        super().__init__()
        if regressor not in ("linear", "released"):
            raise ValueError(f"regressor must be 'linear' or 'released', got {regressor!r}")
        self.regressor = regressor
        self.needs = Needs(student_stages=(student_stage,), teacher_stages=(teacher_stage,))

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        ours = student.feature_shapes()[self.needs.student_stages[0]]
        theirs = teacher.feature_shapes()[self.needs.teacher_stages[0]]
        make = _released if self.regressor == "released" else _linear
        self.players["regressor"] = make(ours, theirs)

    def forward(self, view: View) -> Tensor:
        (ours,), (theirs,) = view.student_features, view.teacher_features
        if self.regressor == "linear":
            size = [min(a, b) for a, b in zip(ours.shape[-2:], theirs.shape[-2:], strict=True)]
            ours, theirs = _pooled(ours, size), _pooled(theirs, size)
        return hint_loss(self.players["regressor"](ours), theirs, reduction="none")


def _linear(ours: Shape, theirs: Shape) -> nn.Module:
    return nn.Conv2d(ours[0], theirs[0], 1)


def _released(ours: Shape, theirs: Shape) -> nn.Module:
    (before, *size), (after, *aim) = ours, theirs
    if size == [2 * side for side in aim]:
        convolution: nn.Module = nn.Conv2d(before, after, 3, stride=2, padding=1)
    elif aim == [2 * side for side in size]:
        convolution = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(size, aim, strict=True)):
        convolution = nn.Conv2d(before, after, [1 + a - b for a, b in zip(size, aim, strict=True)])
    else:
        raise SettingsError(
            f"Hint: the released regressor goes from {size[0]}x{size[1]} to half that, twice that or anything not "
            f"larger, not to {aim[0]}x{aim[1]}: choose other stages, or regressor: linear"
        )
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(after), relu=nn.ReLU()))


def _pooled(feature: Tensor, size: list[int]) -> Tensor:
    return feature if list(feature.shape[-2:]) == size else adaptive_avg_pool2d(feature, size)
