"""Summaries of a comparison's runs: means, spreads and paired intervals, as a table, a file and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COST = "ce"
"""The arm whose step is the unit of cost; without an arm of this name the reference is."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measured:
    """One run: figures of the test images, and its speed.

    Attributes:
        accuracy, ece: in [0, 1].
        nll: in nats.
        agreement: with the teacher, in [0, 1]; None without one.
        images_per_second: median over the windows of the run.
    """

    accuracy: float
    nll: float
    ece: float
    agreement: float | None
    images_per_second: float


@dataclass(frozen=True)
class Choice:
    """What an arm chose before it was compared.

    Attributes:
        setting: changes of its config, by dotted key.
        trials: every setting that was tried, with its accuracy on validation images, in [0, 1].
    """

    setting: dict[str, Any]
    trials: tuple[tuple[dict[str, Any], float], ...]


@dataclass(frozen=True)
class Summary:
    """One arm over its seeds.

    Attributes:
        accuracy: mean, and its standard deviation `spread` (n - 1); None for a single seed.
        difference: mean of the seeds' differences to the reference, and half the width of its
            95 % t-interval; None for the reference, and the width for fewer than two seeds.
        cost: time of a step relative to the arm `COST`, median over the seeds.
        choice: None for an arm that was not tuned.
    """

    name: str
    runs: tuple[Measured, ...]
    accuracy: float
    spread: float | None
    difference: float | None
    half_width: float | None
    ece: float
    agreement: float | None
    cost: float
    choice: Choice | None = None


def summarize(
    measured: Mapping[str, Sequence[Measured]], reference: str, choices: Mapping[str, Choice] | None = None
) -> list[Summary]:
    """One summary an arm, in the order of the arms. The n-th runs of all arms have the same seed."""
    unit = measured.get(COST, measured[reference])
    return [
        Summary(
            name=arm,
            runs=tuple(runs),
            accuracy=statistics.fmean(run.accuracy for run in runs),
            spread=statistics.stdev(run.accuracy for run in runs) if len(runs) > 1 else None,
            **_difference(runs, None if arm == reference else measured[reference]),
            ece=statistics.fmean(run.ece for run in runs),
            agreement=_mean([run.agreement for run in runs]),
            cost=statistics.median(
                one.images_per_second / run.images_per_second for one, run in zip(unit, runs, strict=True)
            ),
            choice=(choices or {}).get(arm),
        )
        for arm, runs in measured.items()
    ]


def table(summaries: Sequence[Summary], reference: str) -> Table:
    """The comparison for a terminal; arms in the order of the file, because the spread ranks few of them."""
    from rich.table import Table

    table = Table(title=f"{len(summaries[0].runs)} seeds, test images; the interval is a paired 95 % t-interval")
    for number, column in enumerate(_header(summaries, reference)):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in _rows(summaries):
        table.add_row(*row)
    return table


def write(summaries: Sequence[Summary], reference: str, folder: Path) -> None:
    """compare.json (every run), compare.md (the table) and compare.png in `folder`."""
    content = {"reference": reference, "confidence": CONFIDENCE, "arms": [asdict(each) for each in summaries]}
    (folder / "compare.json").write_text(json.dumps(content, indent=1), "utf-8")
    lines = [_header(summaries, reference), ["---"] * len(_header(summaries, reference)), *_rows(summaries)]
    (folder / "compare.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), "utf-8")
    _draw(summaries, reference, folder / "compare.png")


def _difference(runs: Sequence[Measured], reference: Sequence[Measured] | None) -> dict[str, float | None]:
    if reference is None:
        return {"difference": None, "half_width": None}
    differences = [run.accuracy - other.accuracy for run, other in zip(runs, reference, strict=True)]
    return {"difference": statistics.fmean(differences), "half_width": half_width(differences)}


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % t-interval of the mean of `values`; None for fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def _header(summaries: Sequence[Summary], reference: str) -> list[str]:
    unit = COST if any(each.name == COST for each in summaries) else reference
    tuned = ["chosen on validation"] if any(each.choice for each in summaries) else []
    return ["arm", "accuracy %", f"minus {reference}", "ECE %", "agreement %", f"step, x {unit}", *tuned]


def _rows(summaries: Sequence[Summary]) -> list[list[str]]:
    return [
        [
            each.name,
            _percent(each.accuracy) + ("" if each.spread is None else f" ± {_percent(each.spread)}"),
            "" if each.difference is None else f"{100 * each.difference:+.2f}" + _within(each.half_width),
            _percent(each.ece),
            "" if each.agreement is None else _percent(each.agreement),
            f"{each.cost:.2f}",
            *([] if each.choice is None else [_told(each.choice)]),
        ]
        for each in summaries
    ]


def _told(choice: Choice) -> str:
    """The setting, its keys by their last part alone, and how many were tried."""
    changes = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in choice.setting.items())
    return f"{changes or 'as it stands'} (of {len(choice.trials)})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _within(half: float | None) -> str:
    return "" if half is None else f" ± {_percent(half)}"


def _draw(summaries: Sequence[Summary], reference: str, path: Path) -> None:
    """Every run as a point, every arm's mean with its standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.38 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    for place, each in enumerate(summaries):
        points = [100 * run.accuracy for run in each.runs]
        colour = "tab:orange" if each.name == reference else "tab:blue"
        axes.plot(points, [place] * len(points), "o", color=colour, alpha=0.35, markersize=4)
        axes.errorbar(100 * each.accuracy, place, xerr=100 * (each.spread or 0), fmt="D", color=colour, capsize=3)
    axes.axvline(100 * next(each.accuracy for each in summaries if each.name == reference), color="grey", alpha=0.4)
    axes.set_yticks(range(len(summaries)), [each.name for each in summaries])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy %, mean ± standard deviation over seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
