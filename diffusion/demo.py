"""A first generator of few steps: digits, from training images to a pipeline that diffusers opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffusion.eval import (
    Extractor,
    GeneratorReport,
    classifier_features,
    compare_grids,
    evaluate_generator,
    open_classifier,
)
from diffusion.generator import Generator
from diffusion.pairs import store_pairs
from visiondistill import recipes, workbench
from visiondistill.data import Source

PAIRS, MEASURED = 4000, 1000
STUDENT_STEPS = (1, 2, 4)
JUDGE = {
    "data": {"class_path": "visiondistill.data.EmbeddedDigits"},
    "student": {
        "class_path": "visiondistill.models.SmallConvNet",
        "init_args": {"widths": [16, 32, 64], "norm": "batch", "in_channels": 1},
    },
    "steps": 1000,
}
"""Over the recipe `ce`: who judges whether a sample is the digit that was asked for."""


def run_demo(folder: Path, seed: int = 0, changes: Mapping[str, Any] | None = None) -> dict[str, GeneratorReport]:
    """Train a judge and a teacher, store pairs, distil; measure teacher and student, draw both.

    What a folder holds already is not done again.

    Args:
        folder: gets `judge`, `teacher`, `pairs`, `student` (runs, with their exports) and `digits.png`.
        changes: dotted keys of the recipes of judge, teacher and student, such as `{"steps": 100}`.

    Returns:
        By title, in the order of steps: the teacher, then the student at each of `STUDENT_STEPS`.
    """
    asked = {"run.seed": seed, "run.progress": True, "run.resume": "auto"} | dict(changes or {})
    own = recipes.override(recipes.load("ce"), JUDGE | {"optim.student.lr": 3e-3, "run.device": "cpu"})
    _run(own, folder / "judge", asked)
    made = _run(recipes.load("measured/digits_teacher"), folder / "teacher", asked)
    print(f"storing {PAIRS:,} pairs of noise and what the teacher makes of it", flush=True)
    export = made.exported.folder
    store_pairs(_opened(export), PAIRS, folder / "pairs", seed, batch_size=200)
    where = {"teacher.folder": str(export), "method.regression.pairs": str(folder / "pairs")}
    learnt = _run(recipes.load("measured/digits_dmd2"), folder / "student", where | asked)
    teacher, student = _opened(export), _opened(learnt.exported.folder)
    panels = {f"teacher, {teacher.steps} steps": (teacher, teacher.steps)}
    panels |= {f"student, {n} step{'s' * (n > 1)}": (student, n) for n in STUDENT_STEPS}
    compare_grids([(title, *panel) for title, panel in panels.items()], folder / "digits.png", 8, 8, seed=seed)
    judge = folder / "judge"
    asked_of = {"features": classifier_features(judge), "classifier": open_classifier(judge)[0]}
    source = recipes.source_of({"data": JUDGE["data"]})
    return {title: _measured(*panel, source, folder, seed, **asked_of) for title, panel in panels.items()}


def _run(config: recipes.Config, folder: Path, changes: Mapping[str, Any]) -> workbench.Outcome:
    return workbench.run(recipes.override(config, {"run.output_dir": str(folder)} | dict(changes)))


def _opened(folder: Path) -> Generator:
    from diffusion.models import open_generator

    return open_generator(folder)


def _measured(
    generator: Generator,
    steps: int,
    source: Source,
    folder: Path,
    seed: int,
    features: Extractor,
    classifier: nn.Module,
) -> GeneratorReport:
    report = evaluate_generator(
        generator,
        source,
        features,
        count=MEASURED,
        batch_size=200,
        steps=steps,
        seed=seed + 1,
        split="train",
        classifier=classifier,
        metrics=("fd", "pr", "diversity"),
        cache=folder / "evaluation",
    )
    report.write(folder / "evaluation", f"{steps}_steps")
    return report
