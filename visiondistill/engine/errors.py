"""The errors that end a run, each with the exit code that the command line returns."""

from __future__ import annotations

from collections.abc import Iterable

NAMED = 10
"""Files, classes or tensors that a message names."""


class TrainingError(RuntimeError):
    """Base class; `exit_code` is what a command returns for it."""

    exit_code = 1


class SettingsError(TrainingError, ValueError):
    """Settings, files or networks that do not fit together, found before the first step."""

    exit_code = 2


class ResumeError(SettingsError):
    """A run folder or checkpoint that cannot be continued as asked."""


class DiskError(TrainingError):
    """The disk refused a checkpoint; the one before it is whole."""

    exit_code = 5


class OutOfMemory(TrainingError):
    """No memory left, on the device or the host; the last checkpoint is whole."""

    exit_code = 4


class NonFinite(TrainingError):
    """A term or gradient was not finite; nothing was updated from it."""

    exit_code = 3


class NoGradient(TrainingError):
    """A turn's loss never reached a player that the turn moves."""


class NotLearning(TrainingError):
    """Proof of learning failed; see `proof.py`."""


def some(names: Iterable[str], limit: int = NAMED) -> str:
    """The first of these names, as a message shows them, and how many more there are."""
    shown = list(map(repr, names))
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return f"{', '.join(shown[:limit]) or 'none'}{more}"
