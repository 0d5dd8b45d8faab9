"""What a run reports: a line of JSON per window of steps, and progress with rate, data wait and ETA."""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from visiondistill.engine.launch import World
from visiondistill.engine.report import Reports

if TYPE_CHECKING:
    from tqdm.auto import tqdm


class Tracker:
    """Writes `metrics.jsonl`, shows progress and feeds other trackers; silent on all processes but the first.

    Progress is a bar on a terminal and in a notebook, and a line per window elsewhere (a log file).
    A terminal that has gone away ends the display, not the run.

    Args:
        folder: the run folder.
        total: steps of all stages.
        done: steps that a resumed run has done: metric lines beyond them are dropped.
        rows: images per step.
        progress: whether any is shown.
        reports: further trackers, fed with the numbers of each line.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        total: int,
        done: int,
        rows: int,
        progress: bool,
        reports: Reports | None = None,
    ) -> None:
        self.rows, self._total = rows, total
        self.history, size = _read(folder / "metrics.jsonl", done)
        self._journal = _Journal(folder / "metrics.jsonl", size) if world.first else None
        self._reports = reports if world.first else None
        self._bar = _bar(total * rows, done * rows) if progress and world.first else None
        self._prints = progress and world.first and self._bar is None
        self.restart()

    def restart(self) -> None:
        """Begin a window, without what was spent on setting up."""
        self._waited, self._since, self._steps = 0.0, perf_counter(), 0

    def waited(self, seconds: float) -> None:
        """Count time that the step spent waiting for data."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Leave time that was spent on something else out of the window's rate."""
        self._since += seconds

    def stepped(self) -> None:
        self._steps += 1
        if self._bar is not None:
            self._show(self._bar.update, self.rows)

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Close a window: its mean terms, with the rate and the share of time that data took."""
        elapsed = max(perf_counter() - self._since, 1e-9)
        measured = {
            **values,
            "images_per_second": round(self._steps * self.rows / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
        }
        line = {"step": step, "stage": stage, **measured}
        self.history.append(line)
        if self._journal is not None:
            self._journal.write(line)
        if self._reports is not None:
            self._reports.log(step, measured)
        if self._bar is not None:
            text = f"{stage} {_brief(values)} wait {line['data_wait']:.0%}"
            self._show(self._bar.set_postfix_str, text, refresh=False)
        if self._prints:
            left = (self._total - step) * elapsed / max(self._steps, 1)
            self.say(
                f"step {step}/{self._total} {stage} {_brief(values)} {line['images_per_second']:.0f} images/s "
                f"wait {line['data_wait']:.0%} ETA {timedelta(seconds=round(left))}"
            )
        self.restart()

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self._bar is not None:
            self._show(self._bar.write, text, file=sys.stderr)
        elif self._prints:
            self._show(print, text, file=sys.stderr)

    def _show(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except (OSError, ValueError):  # a broken pipe, a session that ended, a closed file
            self._bar, self._prints = None, False

    def __enter__(self) -> Tracker:
        if self._reports is not None:
            self._reports.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._show(self._bar.close)
        if self._journal is not None:
            self._journal.close()
        if self._reports is not None:
            self._reports.close()


class _Journal:
    """`metrics.jsonl`: a line is with the operating system when `write` returns, so that a kill loses none.

    A disk that is full does not end the run. What is being trained is worth more than the account of
    it, and room may be there again before it matters: a warning, and the lines that could not be
    written are tried again with each new one. A checkpoint that finds no room does end the run, with
    the one before it whole.

    Args:
        size: bytes of the file that stay; cutting a file short needs no room, writing it anew would.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        if path.exists():
            os.truncate(path, size)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._warned = False

    def write(self, line: Mapping[str, Any]) -> None:
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self.path} could not be written ({error}): training goes on, and the lines are written as soon "
                    f"as that works again. Make room: a checkpoint that cannot be written ends the run.",
                    stacklevel=4,
                )

    def close(self) -> None:
        self._flush()
        with suppress(OSError):
            self._file.close()


def _read(path: Path, done: int) -> tuple[list[dict[str, Any]], int]:
    """The lines up to step `done` and the bytes that they take; a line that a kill tore ends the reading."""
    lines: list[dict[str, Any]] = []
    size = 0
    for raw in path.read_bytes().splitlines(keepends=True) if done and path.is_file() else ():
        try:
            line = json.loads(raw)
            if not raw.endswith(b"\n") or line["step"] > done:
                break
        except (ValueError, LookupError, TypeError):
            break
        lines.append(line)
        size += len(raw)
    return lines, size


def _bar(total: int, initial: int) -> tqdm | None:
    """A progress bar of images, where there is something that can show one."""
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    if not (sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)):
        return None
    return tqdm(total=total, initial=initial, unit="img", unit_scale=True, dynamic_ncols=True, leave=False)


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(world: World) -> dict[str, Any]:
    """Versions and device, for the run folder."""
    names = ("visiondistill", "torch", "torchvision", "timm", "accelerate", "diffusers", "peft")
    packages = {name: version for name in names if (version := _version(name))}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": f"{world.device} {device}".strip(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }


def _brief(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.3g}" for name, value in list(values.items())[:3])
