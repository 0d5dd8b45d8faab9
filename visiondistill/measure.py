"""`evaluate`: a run, an export or a timm model, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from visiondistill import recipes, schema
from visiondistill.schema import RecipeError

if TYPE_CHECKING:
    from visiondistill.data import Source
    from visiondistill.eval import AccuracyReport, Costs

DATA = "kd"
"""Recipe whose data node `--data.*` overrides where no run is named."""


def accuracy(changes: recipes.Config) -> AccuracyReport:
    """Measure on the test images and write the report.

    Args:
        changes: "run" (a run folder) or "model" (a timm name or export folder) with "data.*" keys;
            "output_dir" for the report, by default `evaluation` in the run folder.

    Raises:
        RecipeError: neither or both of run and model, or data that do not fit.
    """
    from visiondistill.eval import accuracy_report

    network, teacher, source, folder = _subject(dict(changes), needs_data=True)
    assert source is not None
    report = accuracy_report(
        network,
        source.test(),
        val=source.val() if "val" in source.splits else None,
        teacher=teacher,
        classes=source.classes,
        data_info={"split": "test"} | source.describe().as_dict(),
        **source.crop,
    )
    report.write(folder)
    return report


def cost(changes: recipes.Config) -> Costs:
    """Measure parameters, operations, latency and throughput of the subject, and of its teacher if it has one.

    Args and errors as of `accuracy`; data are not needed.
    """
    from visiondistill.eval import measure_costs

    network, teacher, source, folder = _subject(dict(changes), needs_data=False)
    named = {"student" if teacher is not None else "model": network}
    costs = measure_costs(
        named | ({"teacher": teacher} if teacher is not None else {}),
        input_size=None if source is None else source.input_size,
    )
    costs.write(folder)
    return costs


def _subject(changes: recipes.Config, needs_data: bool) -> tuple[nn.Module, nn.Module | None, Source | None, Path]:
    run, model, folder = (changes.pop(name, None) for name in ("run", "model", "output_dir"))
    if (run is None) == (model is None):
        raise RecipeError("name what to measure: --run FOLDER, or --model NAME with --data.root DIR")
    if run is not None:
        from visiondistill.export.reopen import open_export

        config = recipes.override(recipes.load(Path(run) / "config.yaml"), changes)
        network, _ = open_export(Path(run) / "export")
        return network, _teacher(config), _source(config), Path(folder or Path(run) / "evaluation")
    from visiondistill.models import Timm

    local = Path(str(model)).is_dir()
    network = Timm(f"local-dir:{model}" if local else str(model), pretrained=True).eval()
    source = None
    if needs_data or changes:
        source = _source(recipes.override({"data": recipes.load(DATA)["data"]}, changes))
    return network, None, source, Path(folder or "evaluation")


def _source(config: recipes.Config) -> Any:
    schema.check(config["data"], Any, "data")
    return schema.build(config["data"], Any, "data")


def _teacher(config: recipes.Config) -> nn.Module | None:
    return schema.build(config["teacher"], nn.Module, "teacher").eval() if "teacher" in config else None
