"""Runs of paired seeds as Markdown: means with their spread, and differences seed by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from visiondistill.summaries import half_width

Runs = Mapping[int, Mapping[str, float]]
"""Figures of one arm by seed."""


def finished(folder: Path, arm: str, seeds: Iterable[int]) -> dict[int, dict[str, float]]:
    """What `result.json` says in those `ARM_SEED` below `folder` that are finished."""
    files = {seed: folder / f"{arm}_{seed}" / "result.json" for seed in seeds}
    return {seed: json.loads(file.read_text("utf-8")) for seed, file in files.items() if file.is_file()}


def spread(runs: Runs, name: str, factor: float = 1, digits: int = 2) -> str:
    """Mean and standard deviation (n - 1) of a figure; "-" where no run has it."""
    values = [factor * run[name] for run in runs.values() if name in run]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def paired(differences: Sequence[float], factor: float = 1, digits: int = 2) -> str:
    """Mean and half the 95 % t-interval of what seeds differ by; "-" for no seed."""
    values = [factor * difference for difference in differences]
    if not values:
        return "-"
    half = half_width(values)
    return f"{statistics.fmean(values):+.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def minus(ours: Runs, others: Runs, name: str, factor: float = 1, digits: int = 2) -> str:
    """As `paired`, of a figure in the seeds that both arms have."""
    return paired([run[name] - others[seed][name] for seed, run in ours.items() if seed in others], factor, digits)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
