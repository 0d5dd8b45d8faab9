"""The interface of heads."""

from __future__ import annotations

from torch import Tensor

from visiondistill.models.network import Network
from visiondistill.parts import Part


class Heads(Part):
    """The student's classifiers in training. Heads beyond the student's own are players, dropped at export.

    Attributes:
        names: what terms may ask for; "main" is the student's own.
    """

    names: tuple[str, ...] = ("main",)

    def connect(self, student: Network) -> None:
        """Build the further classifiers; they become players."""

    def forward(
        self, student: Network, images: Tensor, stages: tuple[int, ...]
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """`({head: logits [B, K]}, {stage: features [B, C, H, W]})` from one pass of the trunk."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")
