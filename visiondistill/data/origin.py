"""Which image of the training set as it was given each image of a split is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Origin(NamedTuple):
    """What answers that were stored once are kept by, whatever was carved off, pruned or left out since.

    Attributes:
        row: int64 `[N]`, each image's place in the whole set; files that cannot be read have one, too.
        count: places of the whole set.
        digest: of all its images, in order; None where it is not known.
    """

    row: Tensor
    count: int
    digest: str | None = None

    @classmethod
    def of(cls, count: int, digests: Sequence[Any] | None = None, row: Tensor | None = None) -> Origin:
        """Of the whole set.

        Args:
            count: its places.
            digests: of its images, as in `Split`.
            row: their places; by default every one has its image.
        """
        whole = None if digests is None else hashlib.sha256(repr(list(digests)).encode()).hexdigest()
        return cls(torch.arange(count) if row is None else row, count, whole)

    def select(self, rows: Tensor) -> Origin:
        """Of some of the images, int64 `[M]`."""
        return self._replace(row=self.row[rows])
