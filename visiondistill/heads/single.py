"""The student as it will be exported."""

from __future__ import annotations

from torch import Tensor

from visiondistill.heads.base import Heads
from visiondistill.models.network import Network, Outputs


class SingleHead(Heads):
    """The student's own classifier, alone."""

    def forward(
        self, student: Network, images: Tensor, stages: tuple[int, ...], embedding: bool
    ) -> tuple[dict[str, Tensor], Outputs]:
        outputs = student(images, stages, embedding)
        return {"main": outputs.logits}, outputs
