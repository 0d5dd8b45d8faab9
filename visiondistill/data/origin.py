"""Where each image of a split stood in the training set as it was given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Origin(NamedTuple):
    """By which stored answers find their images again, whatever was carved off, pruned or left out since.

    Attributes:
        row: int64 `[N]`, each image's place in the whole set; files that cannot be read have places, too.
        count: how many places the whole set has.
        digest: of all its images, in order; None where it is not known.
    """

    row: Tensor
    count: int
    digest: str | None = None

    @classmethod
    def of(cls, count: int, digests: Sequence[Any] | None = None, row: Tensor | None = None) -> Origin:
        """That of the whole set.

        Args:
            count: how many places it has.
            digests: of its images, as in `Split`.
            row: the images' places; by default every place has an image.
        """
        whole = None if digests is None else hashlib.sha256(repr(list(digests)).encode()).hexdigest()
        return cls(torch.arange(count) if row is None else row, count, whole)

    def select(self, rows: Tensor) -> Origin:
        """That of some of its images, int64 `[M]`."""
        return self._replace(row=self.row[rows])
