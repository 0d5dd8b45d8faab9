"""Weights of teacher and label by how many of the training images are left.

Ben-Baruch, Botach, Kviatkovsky, Aggarwal, Medioni: Distilling the Knowledge in Data Pruning, arXiv 2403.07854: the
fewer images, the more the teacher should count. No official code was found: the straight line is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from visiondistill.data.stream import Stream
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch
from visiondistill.models.network import Network
from visiondistill.weighting.fixed import Fixed, Ramp


class ByFraction(Fixed):
    """The teacher's term times `1 - f / 2` plus the label's times `f / 2`, f the share of images that are trained on.

    f in (0, 1] is read off the data, so that it is theirs however they are pruned (`data.Pruned`): the images of
    "train" over those of the training set as it was given. Images that were carved off it for validation or test
    count as left out, like pruned ones.

    Args:
        teacher, truth: the two terms.
        weights: of the other terms, as of `Fixed`.

    Raises:
        SettingsError: `teacher` or `truth` is no term, or has a weight; a stream that does not know its origin.
    """

    def __init__(
        self, teacher: str = "kd", truth: str = "ce", weights: Mapping[str, float | Ramp] | None = None
    ) -> None:
        super().__init__(weights)
        self.teacher, self.truth = teacher, truth
        self.shares: dict[str, float] = {}

    def active(self, terms: Sequence[str]) -> list[str]:
        own = (self.teacher, self.truth)
        if self.teacher == self.truth or not set(own) <= set(terms):
            raise SettingsError(f"the fraction divides between two terms, {list(own)}; the terms are {sorted(terms)}")
        if set(own) & set(self.weights):
            raise SettingsError(f"{list(own)} are weighted by the fraction: give weights for other terms only")
        return super().active(terms)

    def settle(self, student: Network, streams: Mapping[str, Stream]) -> None:
        stream = streams["train"]
        if not isinstance(stream, Stream):
            raise SettingsError(
                f"{type(stream).__name__} is no data.Stream, so that nobody knows which share of a set it is: "
                f"give weights of your own, weighting.Fixed"
            )
        fraction = len(stream.origin.row) / stream.origin.count
        self.shares = {self.teacher: 1 - fraction / 2, self.truth: fraction / 2}

    def _weight(self, name: str, batch: Batch) -> float | Tensor:
        return self.shares[name] if name in self.shares else super()._weight(name, batch)
