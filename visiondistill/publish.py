"""What a run made, again from its recipe and a checkpoint: opened, or exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from visiondistill import recipes
from visiondistill.engine import Result
from visiondistill.engine.checkpoints import Restored, checkpoint_in, restore
from visiondistill.engine.errors import ResumeError, SettingsError
from visiondistill.engine.loop import Use
from visiondistill.export import Exported
from visiondistill.measure import run_config
from visiondistill.schema import RecipeError
from visiondistill.workshop import workshop_of

GIVEN = ("student", "teacher", "data")
"""Keys of a recipe in whose place `distill` takes objects."""


def export_again(
    run: str | Path,
    folder: str | Path | None = None,
    weights: Use = "auto",
    onnx: bool = False,
    checkpoint: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Exported:
    """Export what a run made, from its recipe and a checkpoint: also where it was killed before its own export.

    Figures in the model card are those of `evaluation/accuracy.json` in the run folder where they
    are of these weights; otherwise the test images are measured.

    Args:
        run: the run folder.
        folder: by default `export` in it; an earlier export there is replaced.
        weights: "auto" takes the average where one was kept.
        onnx: write model.onnx, too.
        checkpoint: which; by default the newest whole one, which must be of the last stage.
        changes: dotted keys of the recipe, for data or teacher files that lie elsewhere by now.

    Raises:
        SettingsError, RecipeError: the run cannot be built again, has no such checkpoint or
            average, or names no data; ONNX packages are missing.
    """
    made = reopen(run, weights, checkpoint, changes)
    about = {"recipe": made.config} | _unfinished(made.restored, made.plan)
    place = None if folder is None else Path(folder)
    return workshop_of(made.plan).export(made.plan, made.result, made.product, made.weights, place, about, onnx)


@dataclass(frozen=True)
class Reopened:
    """A run that was built again, with a checkpoint in it, on the CPU.

    Attributes:
        config, plan: its recipe, and what was built of it.
        restored: the checkpoint.
        result: as of `engine.train`, without a history.
        product, weights: as of `Result.choose`.
    """

    config: recipes.Config
    plan: recipes.Plan
    restored: Restored
    result: Result
    product: nn.Module
    weights: str


def reopen(
    run: str | Path,
    weights: Use = "auto",
    checkpoint: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Reopened:
    """What a run made, from its recipe and a checkpoint, whether or not it could be exported.

    Args:
        run, weights, checkpoint, changes: as of `export_again`.

    Raises:
        As of `export_again`.
    """
    run = Path(run)
    if weights not in ("auto", "ema", "raw"):
        raise RecipeError(f"weights: {weights!r}; it must be auto, ema or raw")
    config = recipes.override(run_config(run), changes or {})
    found = checkpoint_in(Path(checkpoint) if checkpoint is not None else run)
    plan = _rebuilt(config, run)
    restored = restore(plan.stages, plan.run, found)
    if checkpoint is None and not restored.last_stage:
        raise ResumeError(
            f"{run} ended in stage '{restored.stage}', before its last one: continue it (train --recipe "
            f"{run / 'config.yaml'} --run.resume auto), or export that stage's product with --checkpoint {found}"
        )
    result = _as_result(restored, run)
    try:
        return Reopened(config, plan, restored, result, *result.choose(weights))
    except ValueError as error:
        raise RecipeError(f"weights: {error}") from error


def _rebuilt(config: recipes.Config, run: Path) -> recipes.Plan:
    """The plan of a run on this machine's CPU, whatever it ran on."""
    path = run / "config.yaml"
    try:
        plan = recipes.plan(recipes.override(config, {"run.device": "cpu"}))
    except (RecipeError, SettingsError) as error:
        message, absent = f"{path} cannot be built again: {error}", [n for n in GIVEN if n not in config]
        if absent:
            message += f"; it names no {', '.join(absent)}, and what was given to distill() as an object is in no file"
        raise RecipeError(message) from error
    return plan


def _as_result(restored: Restored, run: Path) -> Result:
    return Result(
        product=restored.method.presented(restored.product),
        ema=None if restored.ema is None else restored.method.presented(restored.ema),
        history=[],
        output_dir=run,
        step=restored.step,
        reason="finished" if restored.finished else "restored",
        proofs={},
        method=restored.method,
    )


def _unfinished(restored: Restored, plan: recipes.Plan) -> dict[str, Any]:
    if restored.finished:
        return {}
    total = sum(stage.steps for stage in plan.stages)
    return {"checkpoint": f"after step {restored.step} of {total}, in stage '{restored.stage}'"}
