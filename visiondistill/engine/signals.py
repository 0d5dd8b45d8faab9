"""SIGTERM and SIGINT ask for a checkpoint and a clean end; a second SIGINT interrupts at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

from visiondistill.engine.launch import World

STDERR = 2


class Signals:
    """Context manager; `received` is the signal's number once one came, else None.

    Handlers are set in the main thread only: elsewhere (a notebook's worker) nothing is changed.
    At the first signal the first process says what follows, since a step may take a while.
    """

    def __init__(self, world: World) -> None:
        self.world = world
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
        if self.received is None and self.world.first:
            _say(signal.Signals(number).name, alone=self.world.size == 1)
        self.received = number


def _say(name: str, alone: bool) -> None:
    finishes = "this step" if alone else "the steps up to the next metrics line"
    text = f"\n{name}: finishes {finishes} and saves; Ctrl-C interrupts at once from now on\n"
    # Not by `print`: the signal may have come within one, and a file that is being written to refuses a second writer.
    with suppress(OSError):
        os.write(STDERR, text.encode())
