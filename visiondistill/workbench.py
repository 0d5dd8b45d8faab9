"""From a config to a measured, exported student: what the command line and notebooks both call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from visiondistill import recipes
from visiondistill.classifiers import ACCURACY
from visiondistill.data import OwnData, Source
from visiondistill.engine import Result, train
from visiondistill.engine.across import process_index
from visiondistill.engine.checkpoints import Store, restore, stage_name
from visiondistill.engine.launch import launch
from visiondistill.engine.replay import replay as play_again
from visiondistill.engine.state import load
from visiondistill.engine.trial import SWITCHES, fastest
from visiondistill.measure import run_config
from visiondistill.preflight import Preflight
from visiondistill.workshop import workshop_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from visiondistill.export import Exported


@dataclass(frozen=True)
class Outcome:
    """What a recipe led to.

    Attributes:
        student: the product, with averaged weights where an average was kept; eval mode.
        metrics: as in the run folder's `evaluation`: of a classifier on the test images; empty where nothing
            could be measured.
        folder: the run folder.
        result: of the engine.
        facts: of the preflight.
        exported: the export; None where it could not be made.
    """

    student: nn.Module
    metrics: dict[str, Any]
    folder: Path
    result: Result
    facts: Preflight
    exported: Exported | None


def run(
    config: recipes.Config,
    dry_run: bool = False,
    given: Mapping[str, Any] | None = None,
    source: Source | None = None,
    artefacts: bool = True,
) -> Outcome | None:
    """Check, train, measure on the test images, export.

    Args:
        config: a recipe, see `recipes`.
        dry_run: stop after the preflight; nothing is written.
        given: student, teacher (networks) or data (a `Source`) in place of those of the recipe.
        source: the recipe's own data, where they are built already.
        artefacts: export the student and draw plots; without them only figures are written.

    Raises:
        RecipeError, SettingsError: before the first step; the message names the key or file.
        ResumeError: before the first step: the run folder is in use.
        Further errors as of `engine.train`.
    """
    plan = recipes.plan(config, given, source)
    Store.require_free(plan.run)  # before the preflight, which takes its time
    workshop = workshop_of(plan)
    facts = workshop.preflight(plan, rehearse=artefacts)
    if process_index() == 0 and (plan.run.progress or dry_run):
        print("\n".join(facts.lines()), flush=True)
    if dry_run:
        return None
    if config.get("performance") == "auto":
        config, facts = _tuned(plan, config, facts)
    # What was given as an object is in no file: better absent from the recipe than named wrongly.
    config = {name: node for name, node in config.items() if name not in (given or {})}
    config = recipes.resolve(config, given or ())
    result = train(plan.stages, plan.run, config=recipes.dump(config), watch=workshop.watch(plan))
    if process_index() == 0:
        (result.output_dir / "preflight.json").write_text(json.dumps(facts.as_dict(), indent=1, default=str))
    student, weights = result.choose()
    student.eval()
    metrics, exported = {}, None
    if result.reason == "finished":
        metrics, exported = workshop.finish(plan, result, student, weights, facts, config, artefacts)
        if process_index() == 0 and artefacts:
            _plot(result.history, result.output_dir / "curves.png")
    return Outcome(student, metrics, result.output_dir, result, facts, exported)


def distill(
    student: str | nn.Module,
    teacher: str | nn.Module | None = None,
    data: Any = None,
    recipe: str | Path = "kd",
    **changes: Any,
) -> Outcome:
    """Distil from a notebook, in one call: the same as `visiondistill train`.

    Args:
        student, teacher: timm names, or networks (any classifier of pixels in [0, 1]).
        data: an image folder, a `Source`, or a data set of (image, label) pairs.
        recipe: name or file.
        changes: dotted keys of the recipe with "__" for ".", such as `run__output_dir="runs/mine"`.

    Raises:
        As of `run`; always exceptions, never an exit.
    """
    config = recipes.load(recipe)
    given: dict[str, Any] = {}
    for name, value in (("student", student), ("teacher", teacher), ("data", data)):
        if isinstance(value, str | Path):
            key = "root" if name == "data" else "name"
            config = recipes.override(config, {f"{name}.{key}": str(value)})
        elif value is not None:
            given[name] = value if name != "data" or isinstance(value, Source) else OwnData(value)
    outcome = run(recipes.override(config, {k.replace("__", "."): v for k, v in changes.items()}), given=given)
    assert outcome is not None
    return outcome


def replay(folder: str | Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Play again a step that was not finite, from what its run kept; nothing moves and nothing is written.

    Args:
        folder: `replay/step_*` in the run folder; the error of the run names it.
        given: as of `run`, where the run was given objects.

    Returns:
        As `engine.replay.replay`: every term of the step, and what is not finite, the cause first.

    Raises:
        RecipeError, SettingsError: no such folder or run, or files of the run that changed.
    """
    folder = Path(folder)
    _, meta = load(folder)
    run_folder = folder.parent.parent
    plan = recipes.plan(run_config(run_folder), given)
    index = [stage.name for stage in plan.stages].index(meta["stage"])
    handover = None
    if index:
        earlier = run_folder / "checkpoints" / stage_name(index - 1, plan.stages[index - 1])
        handover = restore(plan.stages[:index], plan.run, earlier).method.handover()
    method = plan.stages[index].build(handover)
    return play_again(method.to(launch(plan.run.device).device), folder)


def _tuned(plan: recipes.Plan, config: recipes.Config, facts: Preflight) -> tuple[recipes.Config, Preflight]:
    """The plan's run with the switches of speed that pay here, and the config that says so."""
    plan.run, lines = fastest(plan.stages[0], plan.run, sum(stage.steps for stage in plan.stages))
    lines = ["performance, by a trial on this machine:", *(f"  {line}" for line in lines)]
    if process_index() == 0 and plan.run.progress:
        print("\n".join(lines), flush=True)
    picked = {f"run.{name}": getattr(plan.run, name) for name in SWITCHES}
    config = recipes.override({k: v for k, v in config.items() if k != "performance"}, picked)
    return config, replace(facts, notes=(*facts.notes, *lines))


def _plot(history: list[dict[str, Any]], path: Path) -> None:
    """Every term over the steps and, where it was looked at, the accuracy on validation images."""
    from matplotlib.figure import Figure

    terms = sorted({name for line in history for name in line if "/" in name and not name.startswith(("lr/", "val/"))})
    looked = any(ACCURACY in line for line in history)
    figure = Figure(figsize=(12 if looked else 7, 4.2), layout="constrained")
    panels = figure.subplots(1, 1 + looked, squeeze=False)[0]
    _curves(panels[0], history, terms, "weighted term" if len(terms) > 1 else f"weighted term {''.join(terms)}")
    if looked:
        _curves(panels[1], history, [ACCURACY], "accuracy on validation images")
    figure.savefig(path, dpi=120)


def _curves(axes: Axes, history: list[dict[str, Any]], names: list[str], label: str) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in history if name in line]
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend(frameon=False)
