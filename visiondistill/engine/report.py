"""A run's metric lines for TensorBoard, W&B and their like, which may fail or hang without harm to the run.

Each tracker lives in a daemon thread of its own, fed by a queue that never blocks: the loop hands a
line over and goes on. What a tracker raises (while it starts, takes a line or closes) becomes one
warning per tracker and run; the line is lost to it, the next ones are tried again. One that hangs
is waited for at the end, `PATIENCE` seconds for all of them together, and left behind. The truth
about a run is `metrics.jsonl`, which is complete in all these cases.

A thread is no fence against code that sets torch's globals or draws from its generators: the
trackers that accelerate knows do neither.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pkgutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any

from visiondistill.engine.errors import SettingsError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from visiondistill.engine.settings import Run

PATIENCE = 5.0
"""Seconds that the end of a run waits for its trackers, all together."""

BACKLOG = 1000
"""Lines that a tracker may be behind; further ones are dropped until it catches up."""

_RUN_NAME = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}
"""Argument for a run's name, of the trackers whose first argument is the project that runs belong to."""

_STATE = threading.Lock()


def tracker_classes(names: Sequence[str]) -> dict[str, type[GeneralTracker]]:
    """The class of each tracker, by the name that the user gave it.

    Args:
        names: names that accelerate knows ("tensorboard", "wandb", ...), or class paths
            ("package.module.Class") of `accelerate.tracking.GeneralTracker`s, which are imported.

    Raises:
        SettingsError: no such tracker, or its package is not installed.
    """
    return {name: _imported(name) if "." in name else _known(name) for name in names}


def _known(name: str) -> type[GeneralTracker]:
    from accelerate import utils
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS as KNOWN

    if name not in KNOWN:
        raise SettingsError(
            f"run.report_to: there is no tracker {name!r}; there are {', '.join(sorted(KNOWN))}, "
            f"and class paths of your own (package.module.Class)"
        )
    if not getattr(utils, f"is_{name}_available", lambda: True)():
        raise SettingsError(
            f"run.report_to: {name!r} needs a package that is not installed here: pip install {name}, "
            f"or take it out of the list"
        )
    return KNOWN[name]


def _imported(path: str) -> type[GeneralTracker]:
    from accelerate.tracking import GeneralTracker

    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"run.report_to: {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, GeneralTracker)):
        raise SettingsError(f"run.report_to: {path!r} is not a subclass of accelerate.tracking.GeneralTracker")
    return found


class Reports:
    """The trackers of a run.

    Args:
        run: its settings; `report_to` names the trackers.
        config: the recipe's text, if there is one.
        done: steps that a resumed run has done. TensorBoard hides what it already had beyond them;
            other trackers may show those lines twice, and W&B begins a new run unless its environment
            variables (`WANDB_RUN_ID`, `WANDB_RESUME`) say which one to continue.

    TensorBoard's files lie in `<output_dir>/tensorboard`. Services that group runs get the run
    folder's name for the run, and for the project what `<NAME>_PROJECT` (as in `WANDB_PROJECT`)
    says, else "visiondistill"; all else is theirs to read from the environment.

    Raises:
        SettingsError: see `tracker_classes`.
    """

    def __init__(self, run: Run, config: str | None = None, done: int = 0) -> None:
        self._reporters = [
            _Reporter(name, kind, Path(run.output_dir), partial(settings_of, run, config), done)
            for name, kind in tracker_classes(run.report_to).items()
        ]

    def start(self) -> None:
        for reporter in self._reporters:
            reporter.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand the numbers among `values` to every tracker; returns at once."""
        numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
        for reporter in self._reporters:
            reporter.offer(step, numbers)

    def close(self) -> None:
        """Let the trackers finish, for at most `PATIENCE` seconds."""
        deadline = monotonic() + PATIENCE
        for reporter in self._reporters:
            reporter.end()
        for reporter in self._reporters:
            reporter.wait(max(0.0, deadline - monotonic()))


def settings_of(run: Run, config: str | None) -> dict[str, bool | int | float | str | None]:
    """The run's settings and its recipe by dotted key, as trackers store them."""
    import yaml

    recipe = yaml.safe_load(config) if config is not None else {}
    return dict(_flat({**recipe, "run": dataclasses.asdict(run)}))


def _flat(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [pair for name, value in node.items() for pair in _flat(value, f"{path}.{name}".lstrip("."))]
    plain = node is None or isinstance(node, bool | int | float | str)
    return [(path, node if plain else json.dumps(node, default=str))]


class _Reporter:
    """One tracker in its thread. The calling thread counts what it offers and gives the warning."""

    def __init__(
        self,
        name: str,
        kind: type[GeneralTracker],
        folder: Path,
        settings: Callable[[], dict[str, Any]],
        done: int,
    ) -> None:
        self.name, self.kind, self.folder = name, kind, folder.resolve()
        self._settings, self._done = settings, done
        self._lines: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"report to {name}", daemon=True)
        self._offered = self._delivered = 0
        self._trouble = ""
        self._warned = False

    def start(self) -> None:
        self._thread.start()

    def offer(self, step: int, values: Mapping[str, float]) -> None:
        self._offered += 1
        if self._trouble:
            self._warn(self._trouble)
        if self._lines.qsize() >= BACKLOG:
            self._warn(f"is {BACKLOG} lines behind: lines are dropped until it catches up")
        elif self._thread.is_alive():
            self._lines.put((step, dict(values)))

    def end(self) -> None:
        self._lines.put(None)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._trouble:
            self._warn(self._trouble)
        elif self._thread.is_alive():
            lost = self._offered - self._delivered
            self._warn(f"had not finished {PATIENCE:g} s after the end: {lost} of {self._offered} lines not delivered")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"tracker '{self.name}' {text}. The run goes on; {self.folder / 'metrics.jsonl'} has every line. "
                f"This is said once.",
                stacklevel=2,
            )

    def _work(self) -> None:
        tracker = self._attempt("while it started", self._open)
        if tracker is None:
            return
        self._attempt("over the settings", lambda: tracker.store_init_configuration(self._settings()))
        while (line := self._lines.get()) is not None:
            step, values = line
            self._attempt(f"at step {step}", self._deliver, tracker, values, step)
        self._attempt("while it closed", tracker.finish)

    def _attempt(self, when: str, function: Callable[..., Any], *arguments: Any) -> Any:
        # A library may even call sys.exit: here that would end the thread without a word.
        try:
            return function(*arguments)
        except BaseException as error:
            self._trouble = self._trouble or f"failed {when} ({type(error).__name__}: {error})"
            return None

    def _open(self) -> GeneralTracker:
        from accelerate import PartialState

        # Accelerate's trackers ask its state which process this is, and it cannot be built by two threads at once.
        with _STATE:
            PartialState()
        label = self.folder.name
        options: dict[str, Any] = {}
        if self.name in _RUN_NAME:
            options[_RUN_NAME[self.name]] = label
            label = os.environ.get(f"{self.name.upper()}_PROJECT", "visiondistill")
        if self.name == "tensorboard" and self._done:
            options["purge_step"] = self._done + 1
        place = [str(self.folder / self.kind.name)] if self.kind.requires_logging_directory else []
        tracker = self.kind(label, *place, **options)
        tracker.start()
        return tracker

    def _deliver(self, tracker: GeneralTracker, values: dict[str, float], step: int) -> None:
        tracker.log(values, step=step)
        self._delivered += 1
