"""Trackers that fail in every way, named by class path as a user names one, and a run of a tenth of a second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.nn import functional as F

from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Result, Run, Stage, Terms, Turn, train

STEPS = 12


class Keeps(GeneralTracker):
    """Keeps what it is told; `made` are the trackers of this class since `made` was cleared."""

    name = "keeps"
    requires_logging_directory = False
    made: ClassVar[list[Keeps]]

    def __init_subclass__(cls) -> None:
        cls.made = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name, self.lines, self.settings, self.events = run_name, {}, {}, []
        self.made.append(self)

    @property
    def tracker(self) -> Keeps:
        return self

    def start(self) -> None:
        self.events.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.lines[step] = values

    def finish(self) -> None:
        self.events.append("finish")


Keeps.made = []


class InFolder(Keeps):
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__(run_name)
        self.logging_dir = logging_dir


class RaisesAtInit(Keeps):
    def __init__(self, run_name: str) -> None:
        raise ConnectionError("no such host")


class RaisesAtStart(Keeps):
    def start(self) -> None:
        raise ConnectionError("no such host")


class ExitsAtStart(Keeps):
    def start(self) -> None:
        sys.exit("please log in")


class RaisesAtSettings(Keeps):
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise TypeError("what is this?")


class RaisesAtStep5(Keeps):
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        if step == 5:
            raise ConnectionError("server restarts")
        super().log(values, step)


class RaisesAlways(Keeps):
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        raise ConnectionError("gone")

    def finish(self) -> None:
        raise ConnectionError("still gone")


class RaisesAtClose(Keeps):
    def finish(self) -> None:
        raise ConnectionError("cannot say goodbye")


class Hangs(Keeps):
    """At step 5, until `released`; in a process where nobody does, for ever."""

    released = threading.Event()

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        if step == 5:
            self.released.wait()
        super().log(values, step)


class HangsAtStart(Keeps):
    def start(self) -> None:
        Hangs.released.wait()


class HangsAtClose(Keeps):
    def finish(self) -> None:
        Hangs.released.wait()


class Spoils(Keeps):
    """Changes what it was given."""

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        values.clear()


def path_of(kind: type[GeneralTracker]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Sums(Method):
    """A layer learns the sum of three numbers, under dropout; `at` is called with each step before it is made."""

    def __init__(self, at: Callable[[int], Any]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__({"student": nn.Linear(3, 1)})
        self.at = at

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        self.at(draw.step)
        return batch | {"x": draw.normal("x", 3)}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        x = batch["x"]
        predicted = self.players["student"](F.dropout(x, 0.2, training=True))
        return {"fit": F.mse_loss(predicted, x.sum(1, keepdim=True))}, {}


def run(
    folder: Path,
    *trackers: str,
    at: Callable[[int], Any] = lambda step: None,
    config: str | None = None,
    **settings: Any,
) -> Result:
    """Twelve steps, with a line for each; `trackers` go to `report_to`."""
    fixed = {"batch_size": 8, "device": "cpu", "log_every": 1, "proof_window": 0, "progress": False}
    stage = Stage(Sums(at), STEPS, {"student": Optim(lr=1e-2)})
    return train([stage], Run(str(folder), **(fixed | settings), report_to=list(trackers)), config)
