"""Map-style data set over encoded images, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiondistill.data.pixels import decode
from visiondistill.data.survey import Encoded

if TYPE_CHECKING:
    from PIL import Image


class BrokenImage(OSError):
    """A file that could be read when it was listed, and cannot any more."""

    exit_code = 1


class Pictures:
    """Images of a list of files with their labels.

    `pictures[i]` is `{"image": PIL image of mode L or RGB, "label": int}`.

    Args:
        files: encoded images.
        rows: which of them, `[N]`.
        targets: their labels, int64 `[N]`, -1 for none.
        channels: 1 or 3; see `decode`.
        view: of the decoded image; None leaves it as it is.
    """

    def __init__(
        self,
        files: Encoded,
        rows: Sequence[int],
        targets: Tensor,
        channels: int = 3,
        view: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:
        self.files, self.rows, self.targets, self.channels, self.view = files, list(rows), targets, channels, view

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        try:
            image = decode(self.files.read(row), self.channels)
        except (OSError, ValueError) as error:
            # Never another image in its place: a run would go on with data that nobody chose.
            name = self.files.name(row)
            raise BrokenImage(f"{name} could be read when it was listed, but now: {error}") from error
        return {"image": image if self.view is None else self.view(image), "label": int(self.targets[index])}

    def select(self, rows: Tensor) -> Pictures:
        """The images of some rows, int64 `[M]`."""
        kept = [self.rows[row] for row in rows.tolist()]
        return Pictures(self.files, kept, self.targets[rows], self.channels, self.view)

    def as_stored(self) -> Pictures:
        """The same images at the size that they are stored in, for a random view."""
        return Pictures(self.files, self.rows, self.targets, self.channels)


class Rows:
    """Some rows of any map-style data set.

    Args:
        data: the data set.
        rows: which of its samples, int64 `[N]`.
        targets: their labels, int64 `[N]`, -1 for none.
    """

    def __init__(self, data: Any, rows: Tensor, targets: Tensor) -> None:
        self.data, self.rows, self.targets = data, rows, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.data[int(self.rows[index])]

    def select(self, rows: Tensor) -> Rows:
        return Rows(self.data, self.rows[rows], self.targets[rows])


def every_row(data: Any, targets: Tensor) -> Rows:
    """All rows of `data`."""
    return Rows(data, torch.arange(len(data)), targets)
