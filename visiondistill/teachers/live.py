"""A frozen network that is asked on every batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from visiondistill.engine.method import Batch
from visiondistill.models.network import Network, as_network
from visiondistill.teachers.base import Teacher


class LiveTeacher(Teacher):
    """One pass of a frozen network per batch.

    Args:
        network: a `Network`, or any classifier of pixels in [0, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        network = as_network(network)
        self.frozen[""] = network
        self.num_classes = network.num_classes

    def stage_index(self, stage: int) -> int:
        return self.frozen[""].stage_index(stage)

    def feature_shapes(self) -> list[tuple[int, ...]]:
        return self.frozen[""].feature_shapes()

    def embedding_size(self) -> int:
        return self.frozen[""].embedding_size()

    def targets(self, data: Batch) -> dict[str, Any]:
        return answers(self.frozen[""], data, self.stages, self.embedding)


def answers(network: Network, data: Batch, stages: tuple[int, ...], embedding: bool) -> dict[str, Any]:
    """What `Teacher.targets` gives, of a network."""
    outputs = network(data["image"], stages, embedding)
    pooled = {"embedding": outputs.embedding} if embedding else {}
    return {"logits": outputs.logits, "features": outputs.features, **pooled}


def as_teacher(source: nn.Module) -> Teacher:
    """A source as it is; any network as a `LiveTeacher`."""
    return source if isinstance(source, Teacher) else LiveTeacher(source)
