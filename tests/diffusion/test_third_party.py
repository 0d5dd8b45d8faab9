"""Proof on a model that others trained: the published MNIST model becomes a generator of few steps (minutes: slow)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mnist_ddpm import digits, published
from torch import Tensor

from diffusion.eval import Extractor, RandomExtractor, classifier_features, comparison_table, evaluate_generator
from diffusion.methods import DMD2
from visiondistill import recipes, workbench
from visiondistill.engine import Optim, Run, Stage, train

COUNT = 2000
UPDATES, EVERY, STEPS = 300, 5, 4


def judge(shared_dir: Path, folder: Path) -> Extractor:
    """Features of a conv net that reads the digits."""
    changes: dict[str, Any] = {
        "data": {
            "class_path": "visiondistill.data.Parquet",
            "init_args": {
                "root": str(shared_dir / "data/mnist"),
                "splits": {"train": "test"},
                "channels": 1,
                "size": 28,
                "crop_pct": 1.0,
                "flip": 0.0,
            },
        },
        "student": {
            "class_path": "visiondistill.models.ClassPath",
            "init_args": {
                "class_path": "visiondistill.models.SmallConvNet",
                "init_args": {"widths": [32, 64, 128], "norm": "batch"},
                "input_size": [1, 28, 28],
                "mean": [0.131],
                "std": [0.308],
            },
        },
        "steps": 2000,
        "run": {"output_dir": str(folder), "batch_size": 64, "device": "cpu", "progress": False},
        "optim.student.warmup": 100,
        "optim.student.lr": 3e-3,
    }
    outcome = workbench.run(recipes.override(recipes.load("ce"), changes))
    assert outcome.metrics["accuracy"] > 0.95
    return classifier_features(outcome.folder)


@pytest.mark.slow
def test_the_published_mnist_model_is_distilled(shared_dir: Path, tmp_path: Path) -> None:
    real: Tensor = digits(shared_dir)
    features = [judge(shared_dir, tmp_path / "judge"), RandomExtractor()]
    teacher = published(shared_dir)
    # Of the last of the 1,001 levels 0.6 % is signal: what an eps network says there counts 160-fold in x0.
    laws = {"score_times": teacher.process.time_law(0.02, 0.6), "critic_times": teacher.process.time_law(0.0, 0.65)}
    method = DMD2(teacher, student_every=EVERY, student_steps=STEPS, **laws)
    optim = {
        "student": Optim("adamw", lr=5e-5, schedule="cosine", warmup=20, clip=10.0),
        "default": Optim("adamw", lr=2e-4, warmup=20, clip=10.0),
    }
    run = Run(str(tmp_path / "run"), 16, ema_decay=0.98, ema_warmup=True, device="cpu", progress=False)
    student = train([Stage(method, UPDATES * EVERY, optim)], run, watch=None).ema
    reports = {
        f"{title}, {steps} steps": evaluate_generator(
            generator,
            real,
            features,
            count=COUNT,
            steps=steps,
            metrics=("fd", "pr", "diversity"),
            cache=tmp_path / "reference_features",
        )
        for title, generator, steps in (
            ("teacher", teacher, 50),
            ("teacher", teacher, 4),
            ("student", student, 4),
            ("student", student, 1),
        )
    }
    from rich.console import Console

    Console(width=160).print(comparison_table(reports))
    found = {title: report.samples[f"fd_{features[0].name}"] for title, report in reports.items()}
    assert found["student, 4 steps"] < 0.5 * found["teacher, 4 steps"]
