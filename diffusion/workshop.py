"""Around the training of a generator: its teacher checked, grids while it trains, distances and a pipeline after it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion.generator import Generator
from diffusion.preflight import read_batch, read_own
from visiondistill.engine import Method, Result, Watch
from visiondistill.engine.across import process_count, process_index
from visiondistill.engine.errors import SettingsError
from visiondistill.preflight import Preflight, bytes_of, of_run

if TYPE_CHECKING:
    from diffusion.export import About, ExportedPipeline
    from visiondistill.data import Source
    from visiondistill.recipes import Plan

ASKED = 64
"""Images that a teacher denoises before the run."""

SHOWN = 32
"""Samples in a grid."""

MEASURED = 1000
"""Samples that are measured after a run, and half as many real images on either side of the noise floor."""


class Generators:
    """A `visiondistill.workshop.Workshop` of generators."""

    measured_by = "visiondistill evaluate fd|fid|kid|pr --run"

    def preflight(self, plan: Plan, rehearse: bool = True) -> Preflight:
        """Sizes, the teacher's denoising error, its guidance, and the times at which students will be sampled.

        Raises:
            SettingsError: a teacher that predicts something else than it says or was trained with other noise levels,
                or no room for the checkpoints.
        """
        method = plan.stages[0].method
        notes = [*_described(plan), *_measured(plan), *_of_stages(plan, rehearse and process_count() == 1)]
        return of_run(
            plan,
            trained=bytes_of(p for p in method.players.parameters() if p.requires_grad),
            frozen=bytes_of(method.frozen.parameters()),
            notes=tuple(notes),
        )

    def watch(self, plan: Plan) -> Watch:
        """Grids of samples, always from the same noise, by the steps of the run."""
        folder = Path(plan.run.output_dir) / "samples"

        def watch(generator: nn.Module, step: int) -> dict[str, float]:
            if process_index() == 0 and len(generator.shape) >= 3:
                from diffusion.eval import sample_grid

                sample_grid(generator, folder / f"step_{step:09d}.png", SHOWN // 8, 8)
            return {}

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
    ) -> tuple[dict[str, Any], ExportedPipeline | None]:
        """Distances to the test images in random features, a grid beside the teacher's, a pipeline folder."""
        from diffusion.eval import compare_grids

        folder, metrics, exported = result.output_dir, {}, None
        if process_index():
            return metrics, exported
        if plan.source is not None and len(network.shape) == 3 and _enough(plan.source):
            metrics = _distances(network, plan.source, folder)
        if plots:
            # First what the run was for; a picture can be drawn again.
            exported = _exported(plan, network, weights, folder / "export", {"recipe": config}, metrics)
            teacher = getattr(result.method, "teacher", None)
            panels = [] if teacher is None else [(f"teacher, {_steps(teacher)}", teacher, None)]
            if len(network.shape) >= 3:
                compare_grids([*panels, (_steps(network), network, None)], folder / "samples.png")
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
    ) -> ExportedPipeline:
        from diffusion.export import export_generator

        if onnx:
            raise SettingsError("onnx: generators are exported as diffusers' pipelines, which ONNX files cannot hold")
        folder = folder or result.output_dir / "export"
        try:
            return export_generator(network, folder, about=_about(plan, about), weights=weights)
        except ValueError as error:
            raise SettingsError(f"{result.output_dir} cannot be exported: {error}") from error


def _described(plan: Plan) -> list[str]:
    lines = []
    for role in ("student", "teacher"):
        generator = getattr(plan, role)
        if isinstance(generator, Generator):
            denoiser = generator.denoiser
            guided = "" if generator.guidance_scale == 1 else f", {_guided(generator.guidance)}"
            size = sum(p.numel() for p in denoiser.parameters())
            lines.append(
                f"{role}: {size:,} parameters, predicts {denoiser.prediction_type} on "
                f"{denoiser.process!r}; {generator.steps} steps of {generator.sampler}{guided}"
            )
            lines += [f"{role}: {note}" for note in generator.notes]
    if plan.source is not None and not _enough(plan.source):
        lines.append(f"will not be measured: too few {_judged(plan.source)} images")
    return lines


def _measured(plan: Plan) -> list[str]:
    teacher, source = plan.teacher, plan.source
    if not isinstance(teacher, Generator):
        return []
    try:
        teacher.times()
    except ValueError as error:
        raise SettingsError(f"teacher: it cannot take {teacher.steps} steps: {error}") from error
    if source is None:
        reading = read_own(teacher)
        untold = "teacher not measured: there are no images, and its own samples are denoised by no prediction type"
        return [f"{untold}: is it trained?" if reading is None else reading.check()]
    if source.input_size != teacher.input_size:
        raise SettingsError(
            f"data: images are {list(source.input_size or ())}, the teacher makes {list(teacher.input_size)}: "
            f"give the data the teacher's size"
        )
    split, noised = ("val", "validation images") if "val" in source.splits else ("train", "training images")
    count = min(ASKED, len(source.split(split).label))
    batch = next(source.stream(count, 0, split).open(0, [(0, count)], 0, torch.device("cpu")))[0]
    return [read_batch(teacher, batch, noised).check()]


def _of_stages(plan: Plan, rehearse: bool) -> list[str]:
    """What each stage takes of its teacher, and how its product is sampled."""
    lines, handover = [], None
    for stage in plan.stages:
        name = f"{stage.name}: " if len(plan.stages) > 1 else ""
        try:
            # Later stages are built for this alone, on a copy: a method freezes the teacher that an earlier one trains.
            method = stage.method if isinstance(stage.method, Method) else stage.method(copy.deepcopy(handover))
        except ValueError as error:
            return [*lines, f"{name}not known before the stage ahead of it has trained: {error}"]
        last = stage is plan.stages[-1]
        lines += [name + line for line in (*_guidance(method), *_of_product(method.generator(), rehearse and last))]
        handover = method.handover()
    return lines


def _guidance(method: Method) -> list[str]:
    """Of a method that says how it guides its teacher (`guidance`, as of `Generator`)."""
    taken, teacher = getattr(method, "guidance", None), getattr(method, "teacher", None)
    if taken is None or not isinstance(teacher, Generator):
        return []
    taken, sampled = _guided(taken), _guided(teacher.guidance)
    line = f"the teacher's score is taken with {taken}"
    return [line if taken == sampled else f"{line}, but it samples with {sampled}: its student learns the former"]


def _guided(guidance: Mapping[str, Any]) -> str:
    scale, interval, rescale = (guidance[f"guidance_{name}"] for name in ("scale", "interval", "rescale"))
    if scale == 1:
        return "no guidance"
    between = "" if interval is None else f" at times {interval[0]:g} to {interval[1]:g}"
    return f"guidance {scale:g}{between}" + (f", rescaled by {rescale:g}" if rescale else "")


def _of_product(generator: Generator, rehearse: bool) -> list[str]:
    from diffusion.export import why_not

    # In full: who samples a student elsewhere has to give it these.
    times = ", ".join(map(str, generator.times().tolist()))
    lines = [f"sampled with {generator.sampler}, {_steps(generator)} at {times} (the last is the clean end)"]
    reason = why_not(generator) if rehearse else None
    return lines if reason is None else [*lines, f"will not be exported: {reason}"]


def _steps(generator: Generator) -> str:
    return f"{generator.steps} step{'s' * (generator.steps > 1)}"


def _judged(source: Source) -> str:
    return "test" if "test" in source.splits else "train"


def _enough(source: Source) -> bool:
    """Whether there are real images to compare with, half of them on either side of the noise floor."""
    from diffusion.eval.report import LEAST

    return len(source.split(_judged(source)).label) >= 2 * LEAST


def _distances(generator: Generator, source: Source, folder: Path) -> dict[str, Any]:
    from diffusion.eval import RandomExtractor, evaluate_generator

    split = _judged(source)
    there = len(source.split(split).label)
    report = evaluate_generator(
        generator, source, RandomExtractor(), count=min(MEASURED, there), split=split, cache=folder / "evaluation"
    )
    report.write(folder / "evaluation")
    return report.to_dict()


def _exported(
    plan: Plan,
    generator: Generator,
    weights: str,
    folder: Path,
    method: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> ExportedPipeline | None:
    from diffusion.export import NotExportable, export_generator

    try:
        exported = export_generator(generator, folder, about=_about(plan, method, metrics), weights=weights)
    except NotExportable as reason:
        print(f"not exported: {reason}", flush=True)
        print(f"evaluate, store and diffusion.models.Trained open {folder.parent} itself", flush=True)
        return None
    if plan.run.progress:
        print(f"export ({exported.format}): {exported.folder}", flush=True)
    return exported


def _about(plan: Plan, method: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> About:
    from diffusion.export import About

    data = "no data" if plan.source is None else plan.source.describe().as_dict()
    return About(data=data, teacher=_taught_by(plan.teacher), method=method, metrics=metrics or {})


def _taught_by(teacher: nn.Module | None) -> str:
    """Class and folder of a teacher; "" where the recipe's top names none."""
    if teacher is None:
        return ""
    # Of a pipeline, or of a run of this package.
    place = getattr(teacher, "folder", None) or getattr(teacher, "run", None)
    return type(teacher).__name__ + (f" of {place}" if place else "")
