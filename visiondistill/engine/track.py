"""What a run tells: a line of JSON per window, and a progress bar with rate, data wait and ETA."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from visiondistill.engine.launch import World


class Tracker:
    """Writes `metrics.jsonl` and the progress; silent on all processes but the first.

    Args:
        folder: the run folder.
        total: steps of all stages.
        done: steps behind a resumed run: metric lines beyond them are dropped.
        rows: images per step.
    """

    def __init__(self, folder: Path, world: World, total: int, done: int, rows: int, progress: bool) -> None:
        self.world, self.rows, self.path = world, rows, folder / "metrics.jsonl"
        self.history: list[dict[str, Any]] = self._continue(done) if done else []
        self._file, self._bar, self._lines = None, None, progress and world.first and not sys.stderr.isatty()
        self._total = total
        self.restart()
        if not world.first:
            return
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        self._file = self.path.open("a", buffering=1)
        if progress and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total * rows, initial=done * rows, unit="img", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def _continue(self, done: int) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["step"] <= done]

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
            self._bar.update(self.rows)

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Close a window: its mean terms, with the rate and the share of time that data took."""
        elapsed = max(perf_counter() - self._since, 1e-9)
        line = {
            "step": step,
            "stage": stage,
            **values,
            "images_per_second": round(self._steps * self.rows / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
        }
        self.history.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._bar is not None:
            self._bar.set_postfix_str(f"{stage} {_brief(values)} wait {line['data_wait']:.0%}", refresh=False)
        if self._lines:
            left = (self._total - step) * elapsed / max(self._steps, 1)
            print(
                f"step {step}/{self._total} {stage} {_brief(values)} {line['images_per_second']:.0f} images/s "
                f"wait {line['data_wait']:.0%} ETA {timedelta(seconds=round(left))}",
                file=sys.stderr,
            )
        self.restart()

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines:
            print(text, file=sys.stderr)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        for thing in (self._bar, self._file):
            if thing is not None:
                thing.close()


def environment(world: World) -> dict[str, Any]:
    """Versions and device, for the run folder."""
    packages = {}
    for name in ("visiondistill", "torch", "torchvision", "timm", "accelerate", "diffusers", "peft"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
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
