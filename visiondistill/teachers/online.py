"""A teacher that learns together with the student.

Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018, arXiv 1706.00384, section 3.1.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from visiondistill.engine.method import Batch
from visiondistill.models.network import as_network
from visiondistill.teachers.base import Teacher
from visiondistill.teachers.live import answers


class Online(Teacher):
    """A network trained in the student's turn, by terms in `terms.Peer`; player "teacher", not exported.

    Ordinary terms read its answers without gradients, and peers read the student's likewise.

    Args:
        network: a `Network`, or any classifier of pixels in [0, 1].
    """

    online = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        network = as_network(network)
        self.players[""] = network
        self.num_classes = network.num_classes

    def stage_index(self, stage: int) -> int:
        return self.players[""].stage_index(stage)

    def feature_shapes(self) -> list[tuple[int, ...]]:
        return self.players[""].feature_shapes()

    def embedding_size(self) -> int:
        return self.players[""].embedding_size()

    def targets(self, data: Batch) -> dict[str, Any]:
        return answers(self.players[""], data, self.stages, self.embedding)
