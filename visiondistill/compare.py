"""Recipes side by side: one teacher, student and budget, the same seeds for every arm, and no claim beyond the spread.

A comparison is a YAML file:

    pair: {data: ..., student: ..., teacher: ..., steps: 640, optim: ..., run: ...}   # of every arm
    arms:
      ce: {recipe: ce}
      kd: {recipe: kd}
      taid: {recipe: taid, changes: {method.terms.taid.steps: 640}}
    reference: kd      # whom the others are compared with, seed by seed
    seeds: 6
    seeded: [data.prune_seed]      # optional: keys that take the number of the seed, besides run.seed
    tune:                          # optional: what each arm may choose from, by its accuracy on validation images
      seed: 100                    # of the trials; none of the compared ones
      trials: 2                    # as many for every arm
      settings: {ce: [{optim.student.lr: 4e-3}, {optim.student.lr: 8e-3}], kd: [...], taid: [...]}
    output_dir: runs/compare

`settings` may also be one list, for every arm. Runs lie in `output_dir/ARM/seed_N`, trials in
`output_dir/ARM/trial_N`; those that are finished are not run again, an interrupted one goes on.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiondistill import recipes, schema
from visiondistill.schema import RecipeError
from visiondistill.summaries import Choice, Measured, Summary, summarize, write

if TYPE_CHECKING:
    from visiondistill.data import Source

KEYS = ("pair", "arms", "reference", "seeds", "seeded", "tune", "output_dir")
SHARED = ("student", "teacher", "steps", "run.batch_size")
"""Keys, dotted, that are the same in every arm and trial: what differs otherwise is not the method."""


@dataclass(frozen=True)
class Tuning:
    """What the arms may choose from.

    An arm whose recipe learns from validation images itself (`weighting.Trilateral`) chooses by images that it has
    seen.

    Attributes:
        seed: of every trial.
        settings: by arm, what each trial changes, by dotted key; as many for every arm.
    """

    seed: int
    settings: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        arms: whole configs by name.
        reference: name of the arm that the others are compared with.
        seeds: runs of each arm.
        folder: where the runs and the results lie.
        seeded: dotted keys that take the number of the seed, besides that of the run.
        tuning: None where every arm is run as it stands.
    """

    arms: dict[str, recipes.Config]
    reference: str
    seeds: int
    folder: Path
    seeded: tuple[str, ...] = ()
    tuning: Tuning | None = None

    @property
    def order(self) -> list[int]:
        """All seeds in the order in which they are run: trials first."""
        return [*([] if self.tuning is None else [self.tuning.seed]), *range(self.seeds)]


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
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise RecipeError(f"{unknown[0]}: a comparison has {', '.join(KEYS)}")
    _check_names(content.get("arms"))
    pair, seeded = _mapping(content.get("pair"), "pair"), content.get("seeded") or []
    if not isinstance(seeded, list):
        raise RecipeError(f"seeded: expected a list of dotted keys, got {seeded!r}")
    chosen = _known(changes.pop("arms", None) or list(content["arms"]), content["arms"], "arms")
    seeds, folder = (changes.pop(key, None) or content.get(key) for key in ("seeds", "output_dir"))
    if not isinstance(seeds, int) or seeds < 1:
        raise RecipeError(f"seeds: expected a whole number >= 1, got {seeds!r}")
    reference = content.get("reference")
    if reference not in chosen:
        raise RecipeError(f"reference: {reference!r} is not among the arms {chosen}")
    arms = {arm: _arm(arm, content["arms"][arm], pair, changes, seeded) for arm in chosen}
    for arm, config in arms.items():
        _require_shared(config, arms[reference], f"arms.{arm}")
    tuning = _tuning(content["tune"], arms, list(content["arms"]), seeds) if "tune" in content else None
    return Comparison(arms, reference, seeds, Path(str(folder or "runs/compare")), tuple(seeded), tuning)


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

    measured = run(comparison, say=say)
    choices = {arm: _choice(comparison, arm) for arm in comparison.arms} if comparison.tuning else {}
    summaries = summarize(measured, comparison.reference, choices)
    if process_index() == 0:
        write(summaries, comparison.reference, comparison.folder)
    return summaries


def run(
    comparison: Comparison,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[Measured]]:
    """Run a part of a comparison, so that several processes can share it, each with arms or seeds of its own.

    Args:
        arms, seeds: None for all; the seed of the trials is one of them.
        say: told of every run.

    Returns:
        By arm, the runs of these seeds; trials are not among them.

    Raises:
        RecipeError: no such arm or seed, or an arm whose trials are not finished; further errors as of `compare`.
    """
    from visiondistill.engine.across import process_index

    arms = _known(arms or list(comparison.arms), comparison.arms, "only_arms")
    seeds = _known(comparison.order if seeds is None else seeds, comparison.order, "only_seeds")
    sources: dict[str, Source] = {}
    measured: dict[str, list[Measured]] = {arm: [] for arm in arms}
    for seed in (seed for seed in comparison.order if seed in seeds):
        for arm in arms:
            if comparison.tuning is not None and seed == comparison.tuning.seed:
                told = _try_all(comparison, arm, sources)
            else:
                folder, config = comparison.folder / arm / f"seed_{seed}", _chosen(comparison, arm)
                last = _measure(folder, _placed(_seeded(comparison, config, seed), folder), sources)
                measured[arm].append(last)
                told = f"{arm}, seed {seed}: {last.accuracy:.2%}, {last.images_per_second:.0f} images/s"
            if process_index() == 0:
                say(told)
    return measured


def _content(name: str | Path) -> recipes.Config:
    path = Path(name)
    if not path.is_file():
        path = recipes.folder() / recipes.COMPARISONS / f"{name}.yaml"
    if not path.is_file():
        close = schema.nearest(str(name), names())
        raise RecipeError(f"no comparison {str(name)!r}{close}: name a YAML file or one of {', '.join(names())}")
    return recipes.read(path)


def _known(asked: Any, known: Collection, where: str) -> list:
    if not isinstance(asked, list):
        raise RecipeError(f"{where}: expected a list, got {asked!r}")
    missing = [one for one in asked if one not in known]
    if missing:
        raise RecipeError(
            f"{where}: no {missing[0]!r}{schema.nearest(str(missing[0]), [str(one) for one in known])}; there are "
            f"{', '.join(map(str, known))}"
        )
    return asked


def _check_names(arms: Any) -> None:
    if not isinstance(arms, dict) or not arms:
        raise RecipeError("arms: name at least one, each with its recipe")
    for arm in arms:
        if not isinstance(arm, str) or arm in ("", "..") or arm != Path(arm).name:
            raise RecipeError(f"arms: {arm!r} cannot name the folder in which its runs lie: choose another name")


def _arm(
    name: str, node: Any, pair: recipes.Config, changes: Mapping[str, Any], seeded: Sequence[str]
) -> recipes.Config:
    if not isinstance(node, dict) or set(node) - {"recipe", "changes"} or "recipe" not in node:
        raise RecipeError(f"arms.{name}: expected a recipe and, where needed, changes; got {node!r}")
    config = recipes.merge(recipes.load(node["recipe"]), pair)
    # Who and on what stands in place of the recipe's own, whose arguments are another network's.
    config |= {role: pair[role] for role in ("data", "student", "teacher") if role in pair}
    if "stages" in config:
        raise RecipeError(f"arms.{name}: a recipe of several stages has no budget to share with others")
    own = _mapping(node.get("changes"), f"arms.{name}.changes")
    config = recipes.override(recipes.override(config, own), changes)
    _check(recipes.override(config, dict.fromkeys(seeded, 0)), f"arms.{name}")
    return config


def _mapping(node: Any, where: str) -> dict[str, Any]:
    if not isinstance(node, dict | None):
        raise RecipeError(f"{where}: expected a mapping, got {node!r}")
    return node or {}


def _require_shared(config: recipes.Config, reference: recipes.Config, where: str) -> None:
    for key in SHARED:
        if _at(config, key) != _at(reference, key):
            raise RecipeError(
                f"{where}: {key} is another than the reference's. All arms and trials have one teacher, student and "
                f"budget: give them in `pair`"
            )


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _check(config: recipes.Config, where: str) -> None:
    try:
        recipes.check(config)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _tuning(node: Any, arms: Mapping[str, recipes.Config], named: Sequence[str], seeds: int) -> Tuning:
    if not isinstance(node, dict) or set(node) != {"seed", "trials", "settings"}:
        raise RecipeError(f"tune: expected seed, trials and settings, got {node!r}")
    seed, trials, settings = (node[key] for key in ("seed", "trials", "settings"))
    if not isinstance(trials, int) or trials < 1:
        raise RecipeError(f"tune.trials: expected a whole number >= 1, got {trials!r}")
    if not isinstance(seed, int) or seed in range(seeds):
        raise RecipeError(
            f"tune.seed: {seed!r} must be a whole number that is none of the compared seeds 0 to {seeds - 1}"
        )
    if isinstance(settings, list):
        settings = dict.fromkeys(named, settings)
    if not isinstance(settings, dict) or set(settings) != set(named):
        raise RecipeError(f"tune.settings: expected a list for every arm, {list(named)}, or one for all of them")
    for arm, config in arms.items():
        own = settings[arm]
        if not isinstance(own, list) or len(own) != trials or not all(isinstance(each, dict) for each in own):
            raise RecipeError(
                f"tune.settings.{arm}: expected {trials} trials as for every arm, each a mapping; got {own!r}"
            )
        for number, changes in enumerate(own):
            where, changed = f"tune.settings.{arm}, trial {number}", recipes.override(config, changes)
            _check(changed, where)
            _require_shared(changed, config, where)
    return Tuning(seed, {arm: settings[arm] for arm in arms})


def _seeded(comparison: Comparison, config: recipes.Config, seed: int) -> recipes.Config:
    return recipes.override(config, dict.fromkeys(("run.seed", *comparison.seeded), seed))


def _chosen(comparison: Comparison, arm: str) -> recipes.Config:
    """The arm's config with the setting that it chose, where it was tuned."""
    config = comparison.arms[arm]
    return config if comparison.tuning is None else recipes.override(config, _choice(comparison, arm).setting)


def _choice(comparison: Comparison, arm: str) -> Choice:
    settings, reached = comparison.tuning.settings[arm], []
    for folder, config in _trials(comparison, arm):
        if not _finished(folder):
            raise RecipeError(f"{arm} has unfinished trials: run them first, --only_seeds '[{comparison.tuning.seed}]'")
        _require_same(folder, config)
        reached.append(_validation(folder))
    return Choice(settings[reached.index(max(reached))], tuple(zip(settings, reached, strict=True)))


def _trials(comparison: Comparison, arm: str) -> Iterator[tuple[Path, recipes.Config]]:
    for number, changes in enumerate(comparison.tuning.settings[arm]):
        config = _seeded(comparison, recipes.override(comparison.arms[arm], changes), comparison.tuning.seed)
        folder = comparison.folder / arm / f"trial_{number}"
        yield folder, _placed(recipes.override(config, {"run.evaluate_every": config["steps"]}), folder)


def _try_all(comparison: Comparison, arm: str, sources: dict[str, Source]) -> str:
    for folder, config in _trials(comparison, arm):
        if "val" not in _source(config, sources).splits:
            raise RecipeError("tune: trials are judged by validation images, and these data have none")
        _measure(folder, config, sources)
    choice = _choice(comparison, arm)
    reached = ", ".join(f"{accuracy:.2%}" for _, accuracy in choice.trials)
    return f"{arm}, trials: {reached} on validation images; chosen: {choice.setting or 'as it stands'}"


def _validation(folder: Path) -> float:
    """Accuracy on validation images at the end of a finished trial."""
    from visiondistill.workbench import ACCURACY

    return json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])[ACCURACY]


def _finished(folder: Path) -> bool:
    return _figures(folder) is not None


def _figures(folder: Path) -> dict[str, Any] | None:
    """Of the test images; None where there are none yet, or a kill left half of the file."""
    try:
        return json.loads((folder / "evaluation" / "accuracy.json").read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _placed(config: recipes.Config, folder: Path) -> recipes.Config:
    return recipes.override(config, {"run.output_dir": str(folder), "run.resume": "auto", "run.progress": False})


def _measure(folder: Path, config: recipes.Config, sources: dict[str, Source]) -> Measured:
    if _finished(folder):
        _require_same(folder, config)
    else:
        _run(folder, config, sources)
    return _read(folder)


def _source(config: recipes.Config, sources: dict[str, Source]) -> Source:
    node = recipes.dump(config.get("data", {}))
    if node not in sources:
        sources[node] = recipes.source_of(config)
    return sources[node]


def _run(folder: Path, config: recipes.Config, sources: dict[str, Source]) -> None:
    from visiondistill.workbench import run

    source = _source(config, sources)
    with warnings.catch_warnings():
        # An arm on labels alone keeps the pair's teacher, for its agreement with it.
        warnings.filterwarnings("ignore", message="a teacher is given, but no term")
        outcome = run(config, source=source, artefacts=False)
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
    figures = _figures(folder)
    assert figures is not None
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
