"""What measurements on CIFAR-10 at 16 px have in common: pair and budget of the comparison `cifar16`, and its teacher.

Runs of different arms and seeds need nothing of each other, so that each may have a process of its own
(`--arms ARM --only-seed N`) once the teacher is there; the same command without `--only-seed` then makes
the table and the picture.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from visiondistill import recipes, workbench
from visiondistill.compare import load
from visiondistill.data import Source
from visiondistill.engine import Method, train
from visiondistill.engine.errors import SettingsError
from visiondistill.eval import evaluate

COMPARISON, REFERENCE = "cifar16", "kd"
TEACHER = "runs/cifar16_teacher/export/model.safetensors"


def arguments(about: str, arms: Sequence[str], default: Sequence[str], output: str) -> argparse.Namespace:
    """What the command line says: `data`, `teacher`, `arms`, `seeds` (the numbers), `only_seed` and `output`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--teacher", type=Path, default=Path(TEACHER), help="its weights; trained where it is absent")
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(default))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="run this seed alone, without table and picture")
    parser.add_argument("--output", type=Path, default=Path(output))
    given = parser.parse_args()
    given.seeds = range(given.seeds) if given.only_seed is None else [given.only_seed]
    return given


@dataclass(frozen=True)
class Pair:
    """Data and teacher, read once for all runs of a process."""

    source: Source
    teacher: nn.Module

    @classmethod
    def of(cls, root: str, weights: Path) -> Pair:
        """The pair of the comparison; its teacher is trained first where `weights` is absent."""
        taught(root, weights)
        config = configured(REFERENCE, {"data.root": root, "teacher.weights": str(weights)})
        plan = recipes.plan(config)
        return cls(plan.source, plan.teacher.eval())


def taught(root: str, weights: Path) -> None:
    """Train the teacher by its recipe, `measured/cifar16_teacher`, where `weights` is absent.

    Raises:
        SettingsError: it is absent, and not named as an export is.
    """
    if weights.is_file():
        return
    if weights.parts[-2:] != ("export", "model.safetensors"):
        raise SettingsError(f"teacher: no file {weights}; one is trained only where it is RUN/export/model.safetensors")
    changes = {"data.root": root, "run.output_dir": str(weights.parent.parent), "run.device": "cpu"}
    workbench.run(recipes.override(recipes.load("measured/cifar16_teacher"), changes | {"run.progress": False}))


def configured(arm: str, changes: Mapping[str, Any]) -> recipes.Config:
    """An arm of the comparison, with dotted keys replaced."""
    return recipes.override(load(COMPARISON, {"arms": [*{REFERENCE, arm}]}).arms[arm], changes)


def trained(
    config: recipes.Config, source: Source, teacher: nn.Module, folder: Path, seed: int
) -> tuple[nn.Module, Method, float]:
    """One run: its student in eval mode, the method that trained it, and the accuracy on the test images.

    Raises:
        KeyboardInterrupt: a signal ended it.
    """
    own = {"run.seed": seed, "run.output_dir": str(folder), "run.resume": "auto", "run.device": "cpu"}
    config = recipes.override(config, own | {"run.progress": False})
    config = {name: node for name, node in config.items() if name not in ("data", "teacher")}
    with warnings.catch_warnings():
        # An arm on labels alone has the pair's teacher too.
        warnings.filterwarnings("ignore", message="a teacher is given, but no term")
        plan = recipes.plan(config, {"data": source, "teacher": teacher})
    result = train(plan.stages, plan.run)
    if result.reason != "finished":
        raise KeyboardInterrupt(f"{result.reason} in {folder}")
    student = result.product.eval()
    return student, plan.stages[0].method, evaluate(student, source.test()).accuracy
