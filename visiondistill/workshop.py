"""What is done around the training of one kind of product: classifiers here, others by their own packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from visiondistill.engine import Method, Result, Watch
from visiondistill.engine.across import process_index
from visiondistill.engine.errors import SettingsError
from visiondistill.preflight import Preflight, preflight, taught_by
from visiondistill.schema import RecipeError

if TYPE_CHECKING:
    from visiondistill.data import Source
    from visiondistill.eval import AccuracyReport
    from visiondistill.export import Exported
    from visiondistill.recipes import Plan

ACCURACY = "val/accuracy"
"""In metrics.jsonl: of the product on validation images, in [0, 1]."""
SHOWN = 10
"""Training images in pictures of what was learned."""


class Workshop(Protocol):
    """The checks before a run, the looks during it, the figures and the export after it.

    A method whose product is no classifier names its own by `Method.workshop`. Networks are what
    `Method.presented` makes of the product.

    Attributes:
        measured_by: the command that measures a run's product again, without the run folder at its end.
    """

    measured_by: str

    def preflight(self, plan: Plan, rehearse: bool = True) -> Preflight:
        """Gather the facts of a plan, and refuse what cannot go well.

        Args:
            rehearse: try the export of the product, too.

        Raises:
            SettingsError: it cannot.
        """
        ...

    def watch(self, plan: Plan) -> Watch | None:
        """How the product does, for `train` to log; None where nobody can tell."""
        ...

    def finish(
        self, plan: Plan, result: Result, network: nn.Module, facts: Preflight, config: Mapping[str, Any], plots: bool
    ) -> tuple[dict[str, Any], Exported | None]:
        """Measure, and on the first process write figures and export. Called on all of them.

        Args:
            network: the product, or its average where there is one.
            config: the resolved recipe.
            plots: export and draw, too; otherwise figures alone.
        """
        ...

    def export(
        self,
        plan: Plan,
        result: Result,
        network: nn.Module,
        folder: Path | None,
        about: Mapping[str, Any],
        use: str = "auto",
        onnx: bool = False,
    ) -> Exported:
        """Export what a run made, from a checkpoint.

        Args:
            folder: default `export` in the run folder.
            about: for the model card: the recipe, and what else there is to say.
            use: "auto", "ema" or "raw": which weights `network` holds.
            onnx: write model.onnx, too.

        Raises:
            SettingsError: it cannot be.
        """
        ...


def workshop_of(plan: Plan) -> Workshop:
    """The workshop of what a plan makes: of its last stage's method."""
    return workshop_of_kind(plan.kinds[-1])


def workshop_of_kind(method: Callable) -> Workshop:
    """The workshop of a method's class, or of a function that builds a method."""
    return getattr(method, "workshop", Method.workshop)() or Classifiers()


class Classifiers:
    """Accuracy and calibration on held-out images; folders that timm or torch open."""

    measured_by = "visiondistill evaluate accuracy|cost --run"

    def preflight(self, plan: Plan, rehearse: bool = True) -> Preflight:
        return preflight(plan, rehearse)

    def watch(self, plan: Plan) -> Watch | None:
        source = plan.source
        if source is None or "val" not in source.splits:
            return None
        from visiondistill.eval import evaluate

        val = source.val()

        def watch(product: nn.Module, step: int) -> dict[str, float]:
            scores = evaluate(product, val)
            return {ACCURACY: scores.accuracy, "val/nll": scores.nll}

        return watch

    def finish(
        self, plan: Plan, result: Result, network: nn.Module, facts: Preflight, config: Mapping[str, Any], plots: bool
    ) -> tuple[dict[str, Any], Exported | None]:
        from visiondistill.measure import report_on
        from visiondistill.publish import publish

        source, report, exported = plan.source, None, None
        if source is None:
            return {}, None
        if "test" in source.splits:
            report = report_on(network, source, plan.teacher, "EMA" if result.ema is not None else "raw")
        metrics = {} if report is None else report.to_dict()
        if process_index() == 0 and report is not None:
            report.write(result.output_dir / "evaluation", plots=plots)
        if process_index() == 0 and plots:
            exported = publish(result, source, {"recipe": config}, metrics, facts.taught_by())
            _draw(result, source)
            if plan.run.progress:
                _show(report, exported)
        return metrics, exported

    def export(
        self,
        plan: Plan,
        result: Result,
        network: nn.Module,
        folder: Path | None,
        about: Mapping[str, Any],
        use: str = "auto",
        onnx: bool = False,
    ) -> Exported:
        from visiondistill.measure import require_onnx
        from visiondistill.publish import figures, publish

        if onnx:
            require_onnx()  # before test images are measured
        path = result.output_dir / "config.yaml"
        if plan.source is None:
            raise RecipeError(
                f"{path} names no data at its top, so that classes and image size are unknown. In Python, "
                f"visiondistill.export.export(network, FOLDER, classes=[...], input_size=(C, H, W)) takes them"
            )
        which = "raw" if result.ema is None or use == "raw" else "EMA"
        metrics = figures(result.output_dir, network, plan, which)
        try:
            return publish(result, plan.source, about, metrics, taught_by(plan), folder, use=use, onnx=onnx)
        except ValueError as error:
            raise SettingsError(f"{result.output_dir} cannot be exported: {error}") from error


def _draw(result: Result, source: Source) -> None:
    """Into the run folder, what the method's parts can show of what they have learned."""
    from visiondistill.augmentors.pictures import Draws
    from visiondistill.data import in_order
    from visiondistill.preflight import some_of

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
