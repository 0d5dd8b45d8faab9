"""What is checked and printed before the first step, because most failures are silent after it.

The teacher's accuracy is measured; classes, files, weights, batch, cost and disk are printed; the
export is rehearsed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visiondistill.data import Account, TensorData
from visiondistill.engine.across import process_count
from visiondistill.engine.errors import SettingsError
from visiondistill.eval import evaluate
from visiondistill.eval.classify import chance_level
from visiondistill.export import rehearse
from visiondistill.models import as_network, count_flops, count_parameters, ideal_step_cost
from visiondistill.teachers.base import answers_images

if TYPE_CHECKING:
    from visiondistill.recipes import Plan

TEACHER_IMAGES = 500


@dataclass(frozen=True)
class NetworkFacts:
    """What a network is: parameters, operations of an image (a multiply-add as two), where its weights come from."""

    name: str
    parameters: int
    flops: int | None
    input_size: tuple[int, int, int] | None
    num_classes: int | None
    weights: str
    sha256: str | None


@dataclass(frozen=True)
class Preflight:
    """The facts of a run.

    Attributes:
        data: account of the source.
        student, teacher: facts of the networks that the recipe's top names.
        teacher_accuracy: measured on validation images, in [0, 1]; None without a teacher.
        teacher_images: how many images that was.
        steps: by stage.
        epochs: passes over the training images, of all stages together.
        batch: processes x micro-batches x rows, as text.
        ideal_step_cost: 1 + F_t / (3 F_s): a step with the teacher over one without.
        memory: bytes of weights, gradients, optimiser state and average (activations not counted).
        checkpoint: bytes of one checkpoint.
        disk: bytes that are free for them.
        notes: further lines for people.
    """

    data: Account | None
    steps: dict[str, int]
    epochs: float | None
    batch: str
    memory: int
    checkpoint: int
    disk: int
    student: NetworkFacts | None = None
    teacher: NetworkFacts | None = None
    teacher_accuracy: float | None = None
    teacher_images: int = 0
    ideal_step_cost: float | None = None
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def taught_by(self) -> str:
        """For the model card; "" where the recipe's top names no teacher."""
        return "" if self.teacher is None else _taught_by(self.teacher.name, self.teacher_accuracy)

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        lines = [] if self.data is None else self.data.lines()
        for role, facts in (("student", self.student), ("teacher", self.teacher)):
            if facts is not None:
                lines.append(_network_line(role, facts))
        if self.teacher_accuracy is not None:
            lines.append(f"teacher measured: {self.teacher_accuracy:.1%} of {self.teacher_images} validation images")
        steps = " + ".join(f"{count} ({name})" for name, count in self.steps.items())
        lines.append(f"steps: {steps}" + (f", {self.epochs:.1f} epochs" if self.epochs is not None else ""))
        lines.append(f"batch: {self.batch}")
        if self.ideal_step_cost is not None:
            lines.append(f"ideal step cost: {self.ideal_step_cost:.2f} x a step without the teacher")
        lines.append(
            f"memory without activations: {_bytes(self.memory)}; a checkpoint takes {_bytes(self.checkpoint)}, "
            f"{_bytes(self.disk)} are free"
        )
        return [*lines, *self.notes]


def preflight(plan: Plan, rehearse: bool = True) -> Preflight:
    """Gather the facts of a plan, and refuse what cannot go well.

    Args:
        plan: of `recipes.plan`.
        rehearse: try the export of the student, too.

    Raises:
        SettingsError: classes that do not agree, a teacher near chance, a student that cannot be
            exported, or no room for the checkpoints.
    """
    size = None if plan.source is None else plan.source.input_size
    student, teacher = _facts(plan.student, size), _facts(plan.teacher, size)
    _check_classes(plan)
    accuracy, images = _measure_teacher(plan)
    trained = [] if plan.student is None else [p for p in plan.student.parameters() if p.requires_grad]
    facts = of_run(
        plan,
        trained=bytes_of(trained),
        frozen=0 if plan.teacher is None else bytes_of(plan.teacher.parameters()),
        student=student,
        teacher=teacher,
        teacher_accuracy=accuracy,
        teacher_images=images,
        ideal_step_cost=_ideal(student, teacher),
    )
    if rehearse and plan.source is not None and plan.student is not None and process_count() == 1:
        _rehearse(plan)
    return facts


def of_run(plan: Plan, trained: int, frozen: int, **own: Any) -> Preflight:
    """The facts of a plan that do not hang on what it trains: data, steps, batch, memory, disk.

    Args:
        trained, frozen: bytes of weights.
        own: the other fields of `Preflight`.

    Raises:
        SettingsError: no room for the checkpoints.
    """
    average = trained if plan.run.ema_decay is not None else 0
    checkpoint = 3 * trained + average
    disk = shutil.disk_usage(_existing(Path(plan.run.output_dir))).free
    if disk < checkpoint * (plan.run.keep + 1):
        raise SettingsError(
            f"run.output_dir: {plan.run.keep + 1} checkpoints of {_bytes(checkpoint)} do not fit into {_bytes(disk)}; "
            f"free some space or lower run.keep"
        )
    steps = {stage.name: stage.steps for stage in plan.stages}
    rows = None if plan.source is None else len(plan.source.train())
    return Preflight(
        data=None if plan.source is None else plan.source.describe(),
        steps=steps,
        epochs=None if rows is None else sum(steps.values()) * plan.run.batch_size / rows,
        batch=_batch(plan),
        memory=4 * trained + average + frozen,
        checkpoint=checkpoint,
        disk=disk,
        **own,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def taught_by(plan: Plan) -> str:
    """As `Preflight.taught_by`, with the teacher measured now.

    Raises:
        SettingsError: a teacher near chance.
    """
    return "" if plan.teacher is None else _taught_by(_name(plan.teacher), _measure_teacher(plan)[0])


def _taught_by(name: str, accuracy: float | None) -> str:
    return name if accuracy is None else f"{name}, {accuracy:.1%} on validation"


def _name(network: nn.Module) -> str:
    return getattr(network, "name", type(as_network(network).model).__name__)


def _facts(network: nn.Module | None, image_size: tuple[int, int, int] | None) -> NetworkFacts | None:
    if network is None:
        return None
    adapted = as_network(network)
    try:
        flops = count_flops(adapted, adapted.input_size or image_size)
    except ValueError:
        flops = None
    source = getattr(network, "source", None)
    return NetworkFacts(
        name=_name(network),
        parameters=count_parameters(network),
        flops=flops,
        input_size=adapted.input_size,
        num_classes=adapted.num_classes,
        weights=str(source) if source is not None else "random",
        sha256=getattr(source, "sha256", None),
    )


def _check_classes(plan: Plan) -> None:
    if plan.source is None:
        return
    for role in ("teacher", "student"):
        network = getattr(plan, role)
        if network is not None:
            config = getattr(as_network(network).model, "pretrained_cfg", None)
            names = config.get("label_names") if isinstance(config, Mapping) else None
            require_class_names(names or (), plan.source.classes, f"the {role}")


def require_class_names(names: Sequence[str], classes: Sequence[str], whose: str) -> None:
    """Check the class names that a network was trained with, where it knows any, against those of the data.

    Raises:
        SettingsError: another name, another order, too few or too many.
    """
    if not names:
        return
    for number, pair in enumerate(zip_longest(classes, names)):
        ours, theirs = ("none" if name is None else repr(name) for name in pair)
        if ours != theirs:
            raise SettingsError(
                f"data: class {number} is {ours}, but {theirs} in {whose}: names or their order differ, so every "
                f"label would be read wrongly"
            )


def _measure_teacher(plan: Plan) -> tuple[float | None, int]:
    """Accuracy on validation images; an online teacher has learnt nothing yet, a stored one knows none of them."""
    asked = answers_images(plan.teacher) and not getattr(plan.teacher, "online", False)
    if not asked or plan.source is None or "val" not in plan.source.splits:
        return None, 0
    data = plan.source.val()
    kept = some_of(data, TEACHER_IMAGES)
    scores = evaluate(plan.teacher, kept)
    classes = len(plan.source.classes)
    if scores.accuracy <= chance_level(scores.count, classes):
        raise SettingsError(
            f"teacher: {scores.accuracy:.1%} on {scores.count} validation images is chance ({1 / classes:.1%}): its "
            f"weights were not loaded, its classes are in another order, or its pixels are prepared wrongly. "
            f"weights: {getattr(plan.teacher, 'source', 'unknown')}"
        )
    return scores.accuracy, scores.count


def some_of(data: Any, count: int) -> Any:
    """The same `count` rows every time, spread over the whole set (sets are often sorted by class)."""
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    if isinstance(data, TensorData):
        return TensorData({name: column[rows] for name, column in data.columns.items()})
    return data.select(rows) if hasattr(data, "select") else torch.utils.data.Subset(data, rows.tolist())


def _rehearse(plan: Plan) -> None:
    try:
        rehearse(plan.student, classes=plan.source.classes, input_size=plan.source.input_size)
    except (ValueError, RuntimeError) as error:
        raise SettingsError(f"student: it could not be exported after the training: {error}") from error


def _batch(plan: Plan) -> str:
    processes, parts = process_count(), plan.run.grad_accum_steps
    rows = plan.run.batch_size // (processes * parts)
    return f"{plan.run.batch_size} = {processes} processes x {parts} micro-batches x {rows} images"


def _ideal(student: NetworkFacts | None, teacher: NetworkFacts | None) -> float | None:
    if None in (student, teacher) or None in (student.flops, teacher.flops):
        return None
    return ideal_step_cost(teacher.flops, student.flops)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _network_line(role: str, facts: NetworkFacts) -> str:
    flops = "" if facts.flops is None else f", {facts.flops / 1e9:.3g} GFLOP an image"
    size = "" if facts.input_size is None else f", input {'x'.join(map(str, facts.input_size))}"
    weights = facts.weights
    if facts.sha256 is not None:
        # Short for people, once; preflight.json has the whole of it.
        short = facts.sha256[:12]
        weights = weights.replace(facts.sha256, short) if facts.sha256 in weights else f"{weights}; sha256 {short}"
    return (
        f"{role}: {facts.name}, {facts.parameters:,} parameters{flops}{size}, {facts.num_classes} classes, "
        f"weights {weights}"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
