"""For the verbs `evaluate` and `store`: a run, an export or a timm model is opened and asked about images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visiondistill import recipes, schema
from visiondistill.classifiers import Classifiers, report_on, require_onnx
from visiondistill.data import Source, in_order
from visiondistill.engine.errors import SettingsError
from visiondistill.eval import AccuracyReport, Costs, measure_costs
from visiondistill.export import onnx_variants, open_export
from visiondistill.exported import FACTS
from visiondistill.models import Network
from visiondistill.preflight import require_class_names, some_of
from visiondistill.schema import RecipeError
from visiondistill.teachers import store_targets
from visiondistill.teachers.base import answers_images
from visiondistill.workshop import workshop_of_kind

DATA = "kd"
"""Recipe whose data node `--data.*` overrides where no run names data."""
RANGES, AT_ONCE = 256, 64
"""Training images from which int8 takes the ranges of activations, and how many of them at a time."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        network: in eval mode.
        weights: which it holds, in a word.
        classes: their names, where an export says them.
        teacher: None where the recipe's top names none.
        source: None where data were neither asked for nor given.
        folder: where the report goes.
    """

    network: Network
    weights: str
    classes: tuple[str, ...]
    teacher: nn.Module | None
    source: Source | None
    folder: Path


def accuracy(
    run: str | None = None,
    model: str | None = None,
    output_dir: str | None = None,
    changes: recipes.Config | None = None,
) -> AccuracyReport:
    """Measure on the test images and write the report.

    Args:
        run: a run folder, whose export is measured on the run's data, beside the run's teacher.
        model: in place of a run: a timm name (with its published weights), or the folder of an
            export, in any of its forms.
        output_dir: for the report; by default `evaluation` in the run folder, or here.
        changes: dotted keys of data and, with a run, teacher: `{"data.root": "photos"}`.

    Raises:
        RecipeError, SettingsError: neither or both of run and model, no such model or run, or data
            that do not fit it.
    """
    subject = _subject(run, model, output_dir, changes or {}, judged=True, needs_data=True)
    _check_classes(subject)
    report = report_on(subject.network, subject.source, subject.teacher, subject.weights)
    report.write(subject.folder)
    return report


def cost(
    run: str | None = None,
    model: str | None = None,
    output_dir: str | None = None,
    changes: recipes.Config | None = None,
    onnx: bool = False,
    seconds: float = 3.0,
    batch_size: int = 64,
) -> Costs:
    """Measure parameters, operations, latency and throughput of the subject, and of its teacher if it has one.

    Args:
        run, model, output_dir, changes: as of `accuracy`; data are needed for `onnx` alone, and
            weights of a timm name for nothing.
        onnx: measure the subject as ONNX in float32 and in int8, too; the files stay in `output_dir`.
        seconds, batch_size: as of `eval.measure_costs`.

    Raises:
        As of `accuracy`; also where ONNX packages are missing, or seconds or batch_size are not positive.
    """
    if seconds <= 0 or batch_size < 1:
        raise RecipeError(f"need seconds > 0 and batch_size >= 1, got {seconds} and {batch_size}")
    if onnx:
        require_onnx()
    subject = _subject(run, model, output_dir, changes or {}, judged=False, needs_data=onnx)
    named: dict[str, nn.Module] = {"student" if answers_images(subject.teacher) else "model": subject.network}
    if answers_images(subject.teacher):
        named["teacher"] = subject.teacher
    if onnx:
        named |= onnx_variants(subject.network, subject.folder, _images(subject.source))
    costs = measure_costs(named, batch_size, seconds, input_size=subject.network.input_size)
    costs.write(subject.folder)
    return costs


def store(file: str, run: str | None = None, model: str | None = None, changes: recipes.Config | None = None) -> int:
    """Write the subject's logits on its training images for `teachers.Stored`.

    Args:
        file: where to.
        run, model, changes: as of `accuracy`.

    Returns:
        How many images it was asked about.

    Raises:
        As of `accuracy`; also logits that are not finite.
    """
    subject = _subject(run, model, None, changes or {}, judged=True, needs_data=True)
    _check_classes(subject)
    return store_targets(subject.network, subject.source, file, teacher=str(run or model))


def run_config(run: str | Path) -> recipes.Config:
    """The resolved recipe in a run folder.

    Raises:
        RecipeError: there is none.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise RecipeError(f"{run} is not a run folder: it has no config.yaml")
    return recipes.load(path)


def network_of(model: str, judged: bool = True) -> tuple[Network, dict[str, Any]]:
    """A network by timm name or folder, and what export.json says of it.

    Args:
        judged: its answers count, so that a name needs its published weights.

    Raises:
        RecipeError, SettingsError: no such model, or an export that is damaged.
    """
    folder = Path(model)
    if (folder / FACTS).is_file():
        return _opened(folder)
    name = f"local-dir:{model}" if folder.is_dir() else model
    arguments = {"name": name} | ({"pretrained": True} if judged else {})
    node = {"class_path": "visiondistill.models.Timm", "init_args": arguments}
    return schema.build(node, nn.Module, "model").eval(), {}


def _subject(
    run: str | None, model: str | None, output_dir: str | None, changes: recipes.Config, judged: bool, needs_data: bool
) -> Subject:
    if (run is None) == (model is None):
        raise RecipeError("name what to measure: --run FOLDER, or --model NAME|FOLDER with --data.root DIR")
    if run is not None:
        config = run_config(run)
        _require_classifier(config, run)
        network, facts = _opened(Path(run) / "export", cure=f"; visiondistill export --run {run} makes one")
        folder = Path(run) / "evaluation"
    else:
        config = {}
        if misplaced := [name for name in changes if not name.startswith("data.")]:
            raise RecipeError(f"--{misplaced[0]}: with --model only --data.* can be given")
        network, facts = network_of(model, judged)
        folder = Path("evaluation")
    if "data" not in config and any(name.startswith("data.") for name in changes):
        config["data"] = recipes.load(DATA)["data"]
    config = recipes.override(config, changes)
    return Subject(
        network,
        weights=facts.get("weights", {}).get("which", "pretrained"),
        classes=tuple(facts.get("classes", ())),
        teacher=_teacher(config),
        source=recipes.source_of(config) if needs_data else None,
        folder=Path(output_dir or folder),
    )


def _require_classifier(config: recipes.Config, run: str) -> None:
    workshop = workshop_of_kind(recipes.kinds(config)[-1])
    if not isinstance(workshop, Classifiers):
        raise RecipeError(f"{run} made no classifier; what it made is measured by {workshop.measured_by} {run}")


def _opened(folder: Path, cure: str = "") -> tuple[Network, dict[str, Any]]:
    try:
        return open_export(folder)
    except ValueError as error:
        raise SettingsError(f"{error}{cure}") from error


def _check_classes(subject: Subject) -> None:
    there, count = subject.source.classes, subject.network.num_classes
    if count not in (None, len(there)):
        raise SettingsError(f"data: {len(there)} classes, but the network tells {count} apart")
    require_class_names(subject.classes, there, "the export")


def _teacher(config: recipes.Config) -> nn.Module | None:
    if "teacher" not in config:
        return None
    schema.check(config["teacher"], nn.Module, "teacher")
    return schema.build(config["teacher"], nn.Module, "teacher").eval()


def _images(source: Source) -> Iterator[Tensor]:
    """Training images as an evaluation sees them, from all over the set: they are often sorted by class."""
    return (batch["image"] for batch in in_order(some_of(source.train(), RANGES), AT_ONCE))
