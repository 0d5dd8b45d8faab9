"""What DMD2's adversary and DMD's regression do for one-step students, on real images.

    python -m diffusion.mechanisms.one_step --images fashion16 --data DATA --seeds 3 --output runs/fashion16
    python -m diffusion.mechanisms.one_step --images cifar32 --data DATA/cifar10 --device cuda --output runs/cifar32

One teacher and one classifier that judges (seed 0), the recipes `measured/IMAGES_*` as arms, paired seeds:
Fashion-MNIST at 16 px (for a CPU) or CIFAR-10 at 32 px (for a GPU).
Every generator is measured by 5,000 samples against the test images, in the classifier's features and in
random ones, beside the teacher at several numbers of steps; then a table and a grid are made. What is
finished is not done again, so that arms and seeds may have processes of their own
(`--arms ARM --only-seed N`) once `--arms` with no arm has made what they share.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffusion.eval import RandomExtractor, classifier_features, compare_grids, evaluate_generator
from diffusion.eval.extractors import Extractor, open_classifier
from diffusion.generator import Generator
from diffusion.models import open_generator
from diffusion.pairs import store_pairs
from visiondistill import recipes, workbench
from visiondistill.data import Source
from visiondistill.engine.state import write_text
from visiondistill.mechanisms.tables import finished, markdown, spread

ARMS = ("dmd2", "dmd2_gan", "dmd")
IMAGES = ("fashion16", "cifar32")
SAMPLES = PAIRS = 5000
TEACHER_STEPS = (50, 18, 1)
"""The last shows what a student starts from."""
TIMED = 512
"""Images by which speeds are compared."""
FIGURES = ("fd_classifier", "fd_random", "class_accuracy", "precision_classifier", "recall_classifier")
FIGURES += ("diversity_within_classes_classifier",)


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", choices=IMAGES, default=IMAGES[0])
    parser.add_argument("--data", required=True, help="folder that holds FashionMNIST, or gets it; or CIFAR-10's files")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="run this seed alone, without table and grid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="default runs/IMAGES")
    given = parser.parse_args()
    recipe = Recipe(given.images, given.data, given.device)
    shared = Shared.of(recipe, given.output or Path("runs", given.images))
    seeds = range(given.seeds) if given.only_seed is None else [given.only_seed]
    for seed in seeds:
        for arm in given.arms:
            print(f"{arm}, seed {seed}: {measured(arm, seed, shared)}", flush=True)
    if given.only_seed is None and given.arms:
        print(table(shared, given.arms, seeds))
        draw(shared, given.arms, seeds[0])


@dataclass(frozen=True)
class Recipe:
    """The recipes of one set of images, on one device."""

    images: str
    root: str
    device: str

    def config(self, name: str, changes: Mapping[str, Any] | None = None) -> recipes.Config:
        """Of an arm, "teacher" or "classifier"."""
        own = {"data.root": self.root, "run.device": self.device, "run.progress": False}
        return recipes.override(recipes.load(f"measured/{self.images}_{name}"), own | dict(changes or {}))


@dataclass(frozen=True)
class Shared:
    """What all runs share, in one folder: data, teacher with its pairs and figures, and who judges."""

    recipe: Recipe
    folder: Path
    source: Source
    teacher: Generator
    classifier: nn.Module
    extractors: Sequence[Extractor]

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> Shared:
        """From the folder; what is not there yet is trained, sampled and measured first."""
        source = recipes.source_of(recipe.config("teacher"))
        taught, judge = (_trained(recipe.config(name), source, folder / name) for name in ("teacher", "classifier"))
        teacher, classifier = _opened(taught, source, recipe.device), open_classifier(judge)[0].to(recipe.device)
        extractors = [each.to(recipe.device) for each in (classifier_features(judge), RandomExtractor())]
        shared = cls(recipe, folder, source, teacher, classifier, extractors)
        store_pairs(teacher, PAIRS, folder / "pairs")
        for steps in TEACHER_STEPS:
            print(f"teacher, {steps} steps: {figures(teacher, shared, folder / f'teacher_{steps}', steps)}", flush=True)
        return shared

    def opened(self, place: Path) -> Generator:
        """What the run in that folder exported."""
        return _opened(place, self.source, self.recipe.device)


def measured(arm: str, seed: int, shared: Shared) -> dict[str, float]:
    """One run, trained and measured unless it is already."""
    place = shared.folder / f"{arm}_{seed}"
    changes = {"run.seed": seed, "teacher.folder": str(shared.folder / "teacher" / "export")}
    config = shared.recipe.config(arm, changes)
    if "regression" in config["method"]["init_args"]:
        config = recipes.override(config, {"method.regression.pairs": str(shared.folder / "pairs")})
    return figures(shared.opened(_trained(config, shared.source, place)), shared, place)


def figures(generator: Generator, shared: Shared, place: Path, steps: int | None = None) -> dict[str, float]:
    """Of its samples, kept in `result.json` without the classifier's hash; the whole report in `report.json`."""
    file = place / "result.json"
    if not file.is_file():
        report = evaluate_generator(
            generator,
            shared.source,
            shared.extractors,
            count=SAMPLES,
            steps=steps,
            classifier=shared.classifier,
            metrics=("fd", "pr", "diversity"),
            cache=shared.folder / "reference_features",
        )
        report.write(place, "report")
        write_text(file, json.dumps(_named(report.samples)))
    return json.loads(file.read_text("utf-8"))


def table(shared: Shared, arms: Sequence[str], seeds: Iterable[int]) -> str:
    """Means and standard deviations over seeds, as Markdown; speeds are measured now, one beside the other."""
    seeds = list(seeds)
    student = shared.opened(shared.folder / f"{arms[0]}_{seeds[0]}")
    speeds = {steps: images_per_second(shared.teacher, steps) for steps in TEACHER_STEPS}
    usual, ours = speeds[shared.teacher.steps], images_per_second(student, 1)
    report = json.loads((shared.folder / f"teacher_{shared.teacher.steps}" / "report.json").read_text("utf-8"))
    rows = [_row("real images", {0: _named(report["real"])}, None, usual)]
    for steps, found in finished(shared.folder, "teacher", TEACHER_STEPS).items():
        rows.append(_row(f"teacher, {steps} step{'s' * (steps > 1)}", {steps: found}, speeds[steps], usual))
    rows += [_row(f"{arm}, 1 step", finished(shared.folder, arm, seeds), ours, usual) for arm in arms]
    return markdown(("", *(name.replace("_", " ") for name in FIGURES), "images/s", "speed-up"), rows)


def draw(shared: Shared, arms: Sequence[str], seed: int) -> Path:
    """What teacher and students make of the same noise, `samples.png`."""
    panels = [(f"teacher, {shared.teacher.steps} steps", shared.teacher, None)]
    panels += [(f"{arm}, 1 step", shared.opened(shared.folder / f"{arm}_{seed}"), None) for arm in arms]
    return compare_grids(panels, shared.folder / "samples.png", rows=8, columns=10)


def images_per_second(generator: Generator, steps: int) -> float:
    """Of sampling alone, after a batch that warms up."""
    next(generator.images(64, steps=steps))
    begun = time.perf_counter()
    made = sum(len(images) for images, _ in generator.images(TIMED, steps=steps))
    return made / (time.perf_counter() - begun)


def _row(title: str, runs: Mapping[int, Mapping[str, float]], speed: float | None, usual: float) -> list[str]:
    told = ["-", "-"] if speed is None else [f"{speed:.0f}", f"{speed / usual:.1f}x"]
    return [title, *(spread(runs, name, digits=3) for name in FIGURES), *told]


def _named(samples: Mapping[str, float]) -> dict[str, float]:
    return {re.sub(r"_classifier-[0-9a-f]{8}$", "_classifier", name): value for name, value in samples.items()}


def _trained(config: recipes.Config, source: Source, place: Path) -> Path:
    """The run's folder, with an export."""
    if not (place / "export").is_dir():
        own = {"run.output_dir": str(place), "run.resume": "auto"}
        result = workbench.run(recipes.override(config, own), source=source).result
        if result.reason != "finished":
            raise KeyboardInterrupt(f"{result.reason} in {place}")
    return place


def _opened(place: Path, source: Source, device: str) -> Generator:
    return open_generator(place / "export", num_classes=len(source.classes)).to(device).eval()


if __name__ == "__main__":
    main()
