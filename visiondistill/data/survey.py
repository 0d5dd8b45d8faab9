"""Looking at every encoded image once, before epochs are drawn: can it be read, how large is it, is it there twice."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from visiondistill.data.pixels import decode
from visiondistill.engine.errors import SettingsError

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

AT_ONCE = 64
"""Images that a thread looks at before it fetches more: small ones decode faster than a task is handed over."""

LISTED = 20
"""Bad files that an error message names; the log names all of them."""


class Encoded(Protocol):
    """A list of image files, wherever they lie. Reading is safe from several threads and after pickling."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the image: its path."""
        ...

    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class Skipped:
    """An image that was left out before training, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Look:
    """What was seen of one image: `(height, width)` and sha256, or the reason why it cannot be read."""

    size: tuple[int, int] | None = None
    digest: str | None = None
    pixels: np.ndarray | None = None
    reason: str | None = None


class Budget:
    """Bytes of pixels that may be kept while looking; None for no limit. Nothing is kept once it is overdrawn."""

    def __init__(self, limit: int | None) -> None:
        self.left = limit

    def takes(self, count: int) -> bool:
        if self.left is not None:
            self.left -= count
        return self.left is None or self.left >= 0


def survey(
    files: Encoded, channels: int, view: Callable[[Image.Image], Image.Image] | None, budget: Budget
) -> list[Look]:
    """One `Look` per image, in order. Every image is decoded whole: a cut file shows at its end only.

    Args:
        files: the images.
        channels: 1 or 3; see `decode`.
        view: of the pixels that are kept; None keeps them as decoded.
        budget: how many of them.
    """

    def look(index: int) -> Look:
        try:
            data = files.read(index)
            image = decode(data, channels)
        except (OSError, ValueError) as error:
            return Look(reason=str(error))
        size, digest = (image.height, image.width), hashlib.sha256(data).hexdigest()
        pixels = np.asarray(image if view is None else view(image))
        return Look(size, digest, pixels if budget.takes(pixels.nbytes) else None)

    parts = [range(first, min(first + AT_ONCE, len(files))) for first in range(0, len(files), AT_ONCE)]
    # PIL decodes without holding the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return [each for looks in threads.map(lambda part: [look(index) for index in part], parts) for each in looks]


def skipped(files: Encoded, looks: Sequence[Look]) -> tuple[Skipped, ...]:
    """The images that cannot be read, each logged once."""
    bad = tuple(Skipped(files.name(i), look.reason) for i, look in enumerate(looks) if look.reason is not None)
    for each in bad:
        log.warning("left out %s: %s", each.name, each.reason)
    return bad


def check_quota(bad: dict[str, tuple[Skipped, ...]], listed: dict[str, int], quota: float) -> None:
    """Raises SettingsError, with the list, where more than the share `quota` of a split cannot be read."""
    over = {split: each for split, each in bad.items() if len(each) > quota * listed[split]}
    if not over:
        return
    counts = ", ".join(f"{len(each)} of {listed[split]} in {split}" for split, each in over.items())
    names = [f"  {each.name}: {each.reason}" for split in over.values() for each in split]
    more = [f"  ... and {len(names) - LISTED} more"] if len(names) > LISTED else []
    raise SettingsError(
        f"too many unreadable images: {counts}; max_bad_fraction allows {quota:g} of a split. "
        f"Mend or remove them, or raise max_bad_fraction:\n" + "\n".join(names[:LISTED] + more)
    )
