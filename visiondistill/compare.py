"""Recipes side by side: one teacher, student and budget, the same seeds for every arm, and no claim beyond the spread.

A comparison is a YAML file:

    pair: {data: ..., student: ..., teacher: ..., steps: 640, optim: ..., run: ...}   # of every arm
    arms:
      ce: {recipe: ce}
      kd: {recipe: kd}
      taid: {recipe: taid, changes: {method.terms.taid.steps: 640}}
    reference: kd      # whom the others are compared with, seed by seed
    seeds: 6
    output_dir: runs/compare

Runs lie in `output_dir/ARM/seed_N`; those that are finished are not run again, an interrupted one goes on.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiondistill import recipes, schema
from visiondistill.schema import RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from visiondistill.data import Source

COST = "ce"
"""The arm whose step is the unit of cost; without an arm of this name the reference is."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        arms: whole configs by name.
        reference: name of the arm that the others are compared with.
        seeds: runs of each arm.
        folder: where the runs and the results lie.
    """

    arms: dict[str, recipes.Config]
    reference: str
    seeds: int
    folder: Path


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
class Summary:
    """One arm over its seeds.

    Attributes:
        accuracy: mean, and its standard deviation `spread` (n - 1); None for a single seed.
        difference: mean of the seeds' differences to the reference, and half the width of its
            95 % t-interval; None for the reference, and the width for fewer than two seeds.
        cost: time of a step relative to the arm `COST`, median over the seeds.
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


def load(name: str | Path, changes: Mapping[str, Any] | None = None) -> Comparison:
    """Read a comparison by file, or by the name that it has in `configs/compare/`.

    Args:
        changes: "arms" (a list of names), "seeds" and "output_dir" in place of the file's; every other
            key is a dotted key of the pair, laid over all arms.

    Raises:
        RecipeError: no such comparison, an unknown key, arm or recipe, or arms that do not fit.
    """
    changes = dict(changes or {})
    content = _content(name)
    unknown = sorted(set(content) - {"pair", "arms", "reference", "seeds", "output_dir"})
    if unknown:
        raise RecipeError(f"{unknown[0]}: a comparison has pair, arms, reference, seeds and output_dir")
    if not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise RecipeError("arms: name at least one, each with its recipe")
    chosen = changes.pop("arms", None) or list(content["arms"])
    missing = [arm for arm in chosen if arm not in content["arms"]]
    if missing:
        raise RecipeError(f"arms: no {missing[0]!r}{schema.nearest(missing[0], content['arms'])}")
    seeds, folder = (changes.pop(key, None) or content.get(key) for key in ("seeds", "output_dir"))
    if not isinstance(seeds, int) or seeds < 1:
        raise RecipeError(f"seeds: expected a whole number >= 1, got {seeds!r}")
    reference = content.get("reference")
    if reference not in chosen:
        raise RecipeError(f"reference: {reference!r} is not among the arms {chosen}")
    arms = {arm: _arm(arm, content["arms"][arm], content.get("pair") or {}, changes) for arm in chosen}
    return Comparison(arms, reference, seeds, Path(folder or "runs/compare"))


def names() -> list[str]:
    """Comparisons that come with the package."""
    return sorted(path.stem for path in (recipes.folder() / recipes.COMPARISONS).glob("*.yaml"))


def compare(comparison: Comparison, say: Callable[[str], None] = print) -> list[Summary]:
    """Run what is not finished yet, seed by seed, and write compare.json, compare.md and compare.png.

    Raises:
        RecipeError: a finished run in the folder has other settings.
        KeyboardInterrupt: a signal ended a run; the same call goes on from there.
        Further errors as of `workbench.run`.
    """
    from visiondistill.engine.across import process_index

    sources: dict[str, Source] = {}
    measured: dict[str, list[Measured]] = {arm: [] for arm in comparison.arms}
    for seed in range(comparison.seeds):
        for arm, config in comparison.arms.items():
            measured[arm].append(_measure(comparison.folder / arm / f"seed_{seed}", config, seed, sources))
            if process_index() == 0:
                last = measured[arm][-1]
                say(f"{arm}, seed {seed}: {last.accuracy:.2%}, {last.images_per_second:.0f} images/s")
    summaries = summarize(measured, comparison.reference)
    if process_index() == 0:
        write(summaries, comparison)
    return summaries


def summarize(measured: Mapping[str, Sequence[Measured]], reference: str) -> list[Summary]:
    """What the arms' runs say, in the order of the arms. The runs of one place have one seed."""
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


def write(summaries: Sequence[Summary], comparison: Comparison) -> None:
    """compare.json (every run), compare.md (the table) and compare.png in the comparison's folder."""
    folder, reference = comparison.folder, comparison.reference
    content = {"reference": reference, "confidence": CONFIDENCE, "arms": [asdict(each) for each in summaries]}
    (folder / "compare.json").write_text(json.dumps(content, indent=1), "utf-8")
    lines = [_header(summaries, reference), ["---"] * len(_header(summaries, reference)), *_rows(summaries)]
    (folder / "compare.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), "utf-8")
    _draw(summaries, reference, folder / "compare.png")


def _content(name: str | Path) -> recipes.Config:
    path = Path(name)
    if not path.is_file():
        path = recipes.folder() / recipes.COMPARISONS / f"{name}.yaml"
    if not path.is_file():
        close = schema.nearest(str(name), names())
        raise RecipeError(f"no comparison {str(name)!r}{close}: name a YAML file or one of {', '.join(names())}")
    return recipes.read(path)


def _arm(name: str, node: Any, pair: recipes.Config, changes: Mapping[str, Any]) -> recipes.Config:
    if not isinstance(node, dict) or set(node) - {"recipe", "changes"} or "recipe" not in node:
        raise RecipeError(f"arms.{name}: expected a recipe and, where needed, changes; got {node!r}")
    config = recipes.merge(recipes.load(node["recipe"]), pair)
    # Who and on what stands in place of the recipe's own, whose arguments are another network's.
    config |= {role: pair[role] for role in ("data", "student", "teacher") if role in pair}
    if "stages" in config:
        raise RecipeError(f"arms.{name}: a recipe of several stages has no budget to share with others")
    config = recipes.override(recipes.override(config, node.get("changes") or {}), changes)
    try:
        recipes.check(config)
    except RecipeError as error:
        raise RecipeError(f"arms.{name}: {error}") from error
    return config


def _measure(folder: Path, config: recipes.Config, seed: int, sources: dict[str, Source]) -> Measured:
    own = {"run.seed": seed, "run.output_dir": str(folder), "run.resume": "auto", "run.progress": False}
    config = recipes.override(config, own)
    if (folder / "evaluation" / "accuracy.json").is_file():
        _require_same(folder, config)
    else:
        _run(folder, config, sources)
    return _read(folder)


def _run(folder: Path, config: recipes.Config, sources: dict[str, Source]) -> None:
    from visiondistill.workbench import run

    node = recipes.dump(config.get("data", {}))
    if node not in sources:
        sources[node] = recipes.source_of(config)
    with warnings.catch_warnings():
        # An arm on labels alone keeps the pair's teacher, for its agreement with it.
        warnings.filterwarnings("ignore", message="a teacher is given, but no term")
        outcome = run(config, source=sources[node], artefacts=False)
    assert outcome is not None
    if outcome.result.reason != "finished":
        raise KeyboardInterrupt(f"{outcome.result.reason} in {folder}")


def _require_same(folder: Path, config: recipes.Config) -> None:
    from visiondistill.engine import Run

    def told(content: recipes.Config) -> recipes.Config:
        settings = {name: value for name, value in content["run"].items() if name not in Run.MAY_DIFFER}
        return content | {"run": settings}

    then, now = told(recipes.load(folder / "config.yaml")), told(recipes.read_back(recipes.resolve(config)))
    changed = next(_changed(then, now), None)
    if changed is not None:
        raise RecipeError(
            f"{folder} is finished, with other settings: {changed}. Set it back, or choose another output_dir"
        )


def _changed(then: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*then, *now)):
            yield from _changed(then.get(name), now.get(name), f"{path}.{name}".lstrip("."))
    elif then != now:
        yield f"{path} was {then!r}, is {now!r}"


def _read(folder: Path) -> Measured:
    figures = json.loads((folder / "evaluation" / "accuracy.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    # The first window holds what happens once: caches that fill, the proof of learning.
    rates = [line["images_per_second"] for line in lines][1:] or [lines[0]["images_per_second"]]
    teacher = figures["teacher"]
    return Measured(
        accuracy=figures["accuracy"],
        nll=figures["nll"],
        ece=figures["ece"],
        agreement=None if teacher is None else teacher["agreement"],
        images_per_second=statistics.median(rates),
    )


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
    return ["arm", "accuracy %", f"minus {reference}", "ECE %", "agreement %", f"step, x {unit}"]


def _rows(summaries: Sequence[Summary]) -> list[list[str]]:
    return [
        [
            each.name,
            _percent(each.accuracy) + ("" if each.spread is None else f" ± {_percent(each.spread)}"),
            "" if each.difference is None else f"{100 * each.difference:+.2f}" + _within(each.half_width),
            _percent(each.ece),
            "" if each.agreement is None else _percent(each.agreement),
            f"{each.cost:.2f}",
        ]
        for each in summaries
    ]


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
