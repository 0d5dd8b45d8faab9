"""The student as it will be exported."""

from __future__ import annotations

from torch import Tensor

from visiondistill.heads.base import Heads
from visiondistill.models.network import Network


class SingleHead(Heads):
    """The student's own classifier, alone."""

    def forward(
        self, student: Network, images: Tensor, stages: tuple[int, ...]
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        outputs = student(images, stages)
        return {"main": outputs.logits}, outputs.features
