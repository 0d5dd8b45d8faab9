"""SIGTERM and SIGINT ask for a checkpoint and a clean end; a second SIGINT interrupts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Signals:
    """Context manager; `received` is the signal's number once one came, else None.

    Handlers are set in the main thread only: elsewhere (a notebook's worker) nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
