"""The interface of a weighting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visiondistill.engine.method import Combine, Terms
from visiondistill.parts import Part
from visiondistill.terms.base import Needs, View


class Weighting(Part):
    """From the terms' values to the turn's weighted scalars.

    Attributes:
        per_sample: it weights the rows of every term one by one; see `by_row`.
        needs: what it reads besides the values; None for the batch alone.
        combine: how the gradients of groups of terms become one; see `Turn`. None for their sum.
    """

    per_sample: bool = False
    needs: Needs | None = None
    combine: Combine | None = None

    def active(self, terms: Sequence[str]) -> list[str]:
        """The terms that are to be computed.

        Raises:
            SettingsError: a weight is given for a term that is not there.
        """
        return list(terms)

    def by_row(self, term: str) -> bool:
        """Whether it weights the term's rows one by one: one with a value per batch only is then refused."""
        return self.per_sample

    def forward(self, values: dict[str, Tensor], view: View) -> Terms:
        """`{term: [B] or scalar}` to `{term or "group/term": weighted scalar}`; means over rows."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")
