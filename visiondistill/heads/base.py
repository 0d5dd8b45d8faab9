"""The interface of heads."""

from __future__ import annotations

from torch import Tensor, nn

from visiondistill.models.network import Network, Outputs
from visiondistill.parts import Part


class Heads(Part):
    """The student's classifiers in training. Heads beyond the student's own are players, dropped at export.

    Attributes:
        names: what terms may ask for; "main" is the student's own.
    """

    names: tuple[str, ...] = ("main",)

    def forward(
        self, student: Network, images: Tensor, stages: tuple[int, ...], embedding: bool
    ) -> tuple[dict[str, Tensor], Outputs]:
        """`{head: logits [B, K]}`, and what else was asked of the trunk, from one pass of it."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def product(self, student: Network) -> nn.Module:
        """What is averaged and exported: always the same object."""
        return student
