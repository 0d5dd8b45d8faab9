"""Around the training of a classifier: accuracy on held-out images during and after it, an export that opens alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from visiondistill.augmentors.pictures import Draws
from visiondistill.data import Source, in_order
from visiondistill.engine import Result, Watch
from visiondistill.engine.across import process_index
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.launch import launch
from visiondistill.eval import AccuracyReport, accuracy_report, evaluate, weights_hash
from visiondistill.export import About, Exported, export, onnx_file
from visiondistill.preflight import Preflight, preflight, some_of, taught_by
from visiondistill.schema import RecipeError
from visiondistill.teachers.base import answers_images

if TYPE_CHECKING:
    from visiondistill.recipes import Plan

ACCURACY = "val/accuracy"
"""In metrics.jsonl: of the product on validation images, in [0, 1]."""
SHOWN = 10
"""Training images in pictures of what was learned."""


class Classifiers:
    """A `visiondistill.workshop.Workshop` of classifiers."""

    measured_by = "visiondistill evaluate accuracy|cost --run"

    def preflight(self, plan: Plan, rehearse: bool = True) -> Preflight:
        return preflight(plan, rehearse)

    def watch(self, plan: Plan) -> Watch | None:
        source = plan.source
        if source is None or "val" not in source.splits:
            return None
        val = source.val()

        def watch(product: nn.Module, step: int) -> dict[str, float]:
            scores = evaluate(product, val)
            return {ACCURACY: scores.accuracy, "val/nll": scores.nll}

        return watch

    def finish(
        self,
        plan: Plan,
        result: Result,
        network: nn.Module,
        weights: str,
        facts: Preflight,
        config: Mapping[str, Any],
        plots: bool,
    ) -> tuple[dict[str, Any], Exported | None]:
        source, report, exported = plan.source, None, None
        if source is None:
            return {}, None
        if "test" in source.splits:
            report = report_on(network, source, plan.teacher, weights)
        metrics = {} if report is None else report.to_dict()
        if process_index() == 0 and report is not None:
            report.write(result.output_dir / "evaluation", plots=plots)
        if process_index() == 0 and plots:
            about = About(teacher=facts.taught_by(), method={"recipe": config}, metrics=metrics)
            exported = _export(network, weights, result.output_dir / "export", source, about)
            _draw(result, source)
            if plan.run.progress:
                _show(report, exported)
        return metrics, exported

    def export(
        self,
        plan: Plan,
        result: Result,
        network: nn.Module,
        weights: str,
        folder: Path | None,
        about: Mapping[str, Any],
        onnx: bool = False,
    ) -> Exported:
        if onnx:
            require_onnx()  # before test images are measured
        run = result.output_dir
        if plan.source is None:
            raise RecipeError(
                f"{run / 'config.yaml'} names no data at its top, so that classes and image size are unknown. In "
                f"Python, visiondistill.export.export(network, FOLDER, classes=[...], input_size=(C, H, W)) takes them"
            )
        metrics = _figures(run, network, plan, weights)
        card = About(teacher=taught_by(plan), method=about, metrics=metrics)
        try:
            return _export(network, weights, folder or run / "export", plan.source, card, onnx)
        except ValueError as error:
            raise SettingsError(f"{run} cannot be exported: {error}") from error


def report_on(
    network: nn.Module, source: Source, teacher: nn.Module | None = None, weights: str = "as given"
) -> AccuracyReport:
    """A classifier on the test images of a source, its temperature fitted on the validation images."""
    return accuracy_report(
        network,
        source.test(),
        val=source.val() if "val" in source.splits else None,
        teacher=teacher if answers_images(teacher) else None,
        classes=source.classes,
        data_info={"split": "test"} | source.describe().as_dict(),
        weights=weights,
        **source.crop,
    )


def require_onnx() -> None:
    """Raise SettingsError, which names the extra to install, where packages for ONNX are missing."""
    try:
        onnx_file.require_onnx()
    except ModuleNotFoundError as error:
        raise SettingsError(f"onnx: {error}") from error


def _export(
    network: nn.Module, weights: str, folder: Path, source: Source, about: About, onnx: bool = False
) -> Exported:
    """For the classes and images of its data."""
    about = replace(about, data=source.describe().as_dict())
    return export(
        network,
        folder,
        classes=source.classes,
        about=about,
        weights=weights,
        input_size=source.input_size,
        onnx=onnx,
        **source.crop,
    )


def _figures(run: Path, network: nn.Module, plan: Plan, weights: str) -> Mapping[str, Any]:
    """Figures of a run's test images: those in its folder if they are of these weights, otherwise measured now."""
    stored = run / "evaluation" / "accuracy.json"
    if stored.is_file():
        kept = json.loads(stored.read_text("utf-8"))
        if kept["weights"]["sha256"] == weights_hash(network):
            return kept
    if "test" not in plan.source.splits:
        return {}
    device = launch().device
    teacher = None if plan.teacher is None else plan.teacher.to(device)
    return report_on(network.to(device).eval(), plan.source, teacher, weights).to_dict()


def _draw(result: Result, source: Source) -> None:
    """Into the run folder, what the method's parts can show of what they have learned."""
    parts = [part for part in result.method.modules() if isinstance(part, Draws)]
    if parts:
        images = next(in_order(some_of(source.train(), SHOWN), SHOWN))["image"]
        for part in parts:
            part.draw(images[: len(images) // 2 * 2], result.output_dir)


def _show(report: AccuracyReport | None, exported: Exported) -> None:
    from rich.console import Console

    console = Console()
    if report is not None:
        console.print(report.table())
    console.print(f"export ({exported.format}): {exported.folder}")
