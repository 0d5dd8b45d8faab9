"""Data sets that fit in memory."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Self

import torch
from torch import Tensor

from visiondistill.data.samples import as_float_image


class TensorData:
    """Columns of equal length, kept on one device and indexed there.

    Args:
        columns: `{name: [N, ...]}`. "image" is `[N, C, H, W]`, floating in [0, 1] or uint8 (divided
            by 255 when read); "label" is int64 `[N]` with -1 for images without a label.

    Raises:
        ValueError: no column, no row, unequal lengths, or a column of another type than said.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if not lengths or min(lengths.values()) == 0:
            raise ValueError(f"{type(self).__name__} is empty: columns have lengths {lengths}")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{type(self).__name__}: columns have different lengths {lengths}")
        if "index" in columns:
            raise ValueError(f"{type(self).__name__}: 'index' is the row's number, given by the stream")
        _check_types(columns)
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Rows `[M]` of every column, and the "index" itself; images as floating tensors in [0, 1]."""
        picked = {name: column.index_select(0, index) for name, column in self.columns.items()}
        if "image" in picked:
            picked["image"] = as_float_image(picked["image"])
        return picked | {"index": index}

    def select(self, rows: Tensor) -> Self:
        """The same with rows `[M]` alone."""
        chosen = copy(self)
        chosen.columns = {name: column[rows] for name, column in self.columns.items()}
        return chosen

    @property
    def device(self) -> torch.device:
        return next(iter(self.columns.values())).device

    def to(self, device: torch.device) -> TensorData:
        """Move the columns there, in place."""
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        return self

    @property
    def labelled_fraction(self) -> float:
        """Share of rows whose label is not -1; 0 for a set without labels."""
        label = self.columns.get("label")
        return 0.0 if label is None else (label >= 0).double().mean().item()


def _check_types(columns: Mapping[str, Tensor]) -> None:
    image, label = columns.get("image"), columns.get("label")
    if image is not None and (image.ndim != 4 or not (image.is_floating_point() or image.dtype == torch.uint8)):
        raise ValueError(f"'image' must be [N, C, H, W], floating or uint8, got {image.dtype} {tuple(image.shape)}")
    if label is not None and (label.ndim != 1 or label.dtype != torch.int64):
        raise ValueError(f"'label' must be int64 [N], got {label.dtype} {tuple(label.shape)}")
