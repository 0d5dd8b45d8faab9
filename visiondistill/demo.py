"""A first distillation on real digits: what a teacher is worth to a student that has few labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

RECIPE = "smoke/kd"
STUDENT = "stages.student.method.init_args"
DATA = f"{STUDENT}.streams.train.init_args.data.init_args"
WEIGHTS = f"{STUDENT}.weighting.init_args.weights"


@dataclass(frozen=True)
class Arm:
    """One way to train the student: the recipe with some keys changed."""

    name: str
    images: str
    teacher: bool
    changes: dict[str, Any]


ARMS = (
    Arm("labels", "50 labelled", False, {WEIGHTS: {"kd": 0.0}, f"{DATA}.unlabelled": "drop"}),
    Arm("labels + KD", "the same 50", True, {f"{DATA}.unlabelled": "drop"}),
    Arm("labels + KD", "50 + 1,047 unlabelled", True, {}),
    Arm("labels", "1,097 labelled", False, {WEIGHTS: {"kd": 0.0}, f"{DATA}.labels_per_class": None}),
)
BASELINE, DISTILLED = 0, 2


@dataclass
class Trained:
    """A network, and how fast it was trained."""

    network: nn.Module
    images_per_second: float


@dataclass(frozen=True)
class Row:
    """What the demo found about one network or arm.

    Attributes:
        name, images: what it was taught by, on which images.
        parameters: of the network.
        accuracy: on the test images, one number per seed, in [0, 1].
        images_per_second: in training, median over windows and seeds.
    """

    name: str
    images: str
    parameters: int
    accuracy: list[float]
    images_per_second: float

    @property
    def spread(self) -> str:
        """Mean and standard deviation over seeds, in percent."""
        around = f" ± {100 * stdev(self.accuracy):.1f}" if len(self.accuracy) > 1 else ""
        return f"{100 * mean(self.accuracy):.1f}{around}"


def run_demo(output_dir: str | Path, seeds: Sequence[int] = range(3)) -> list[Row]:
    """Train a teacher, and a student in four ways over several seeds; print and plot test accuracies.

    The runs are those of the recipe "smoke/kd" with a few keys changed; a demo that was cut off
    continues when it is started again. Takes about a minute on one CPU core.

    Args:
        output_dir: gets a run folder per training, `results.json` and `demo.png`.
        seeds: one student of each kind per seed, which decides its initial weights, the order of
            images and which images keep their labels.

    Returns:
        The teacher's row, then one per arm.
    """
    from rich.console import Console

    output_dir, seeds, console = Path(output_dir), list(seeds), Console()
    with console.status("teacher"):
        teacher = _trained(0, output_dir / "teacher", {}, seed=0)
    students: list[list[Trained]] = []
    for number, arm in enumerate(ARMS):
        with console.status(f"student, {arm.name} ({arm.images})"):
            folders = [output_dir / f"student_{number}_seed_{seed}" for seed in seeds]
            known = teacher.network if arm.teacher else None
            students.append(
                [
                    _trained(1, folder, {**arm.changes, f"{DATA}.label_seed": seed}, seed, known)
                    for folder, seed in zip(folders, seeds, strict=True)
                ]
            )
    rows = _measured(teacher, students)
    _show(rows, console)
    (output_dir / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    _plot(rows, _misread(students), output_dir / "demo.png")
    console.print(f"Plot: {output_dir / 'demo.png'}; run folders and results.json beside it.")
    return rows


def _trained(stage: int, folder: Path, changes: dict[str, Any], seed: int, teacher: nn.Module | None = None) -> Trained:
    """One stage of the recipe as a run of its own, so that all arms share one teacher."""
    from visiondistill import recipes, train

    settings = {"run.output_dir": str(folder), "run.seed": seed, "run.progress": False, "run.resume": "auto"}
    config = recipes.override(recipes.load(RECIPE), {**changes, **settings})
    stages, run = recipes.build(config)
    chosen = stages[stage] if stage == 0 else replace(stages[stage], method=stages[stage].method(teacher))
    result = train([chosen], run, config=recipes.dump(config))
    return Trained(result.product, median(line["images_per_second"] for line in result.history))


def _measured(teacher: Trained, students: list[list[Trained]]) -> list[Row]:
    """All networks on the test images, which are read here and nowhere before."""
    from visiondistill.data import Digits
    from visiondistill.eval import evaluate

    test = Digits("test")

    def row(name: str, images: str, trained: Sequence[Trained]) -> Row:
        return Row(
            name,
            images,
            sum(p.numel() for p in trained[0].network.parameters()),
            [evaluate(each.network, test).accuracy for each in trained],
            median(each.images_per_second for each in trained),
        )

    return [row("labels", "1,097 labelled", [teacher])] + [
        row(arm.name, arm.images, trained) for arm, trained in zip(ARMS, students, strict=True)
    ]


def _show(rows: Sequence[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table

    seeds = len(rows[1].accuracy)
    table = Table(
        title=f"Test accuracy on 500 digits, {seeds} seeds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("network", "taught by", "training images", "params", "accuracy %", "img/s"):
        table.add_column(name, justify="left" if name in ("network", "taught by", "training images") else "right")
    for number, row in enumerate(rows):
        table.add_row(
            "student" if number else "teacher",
            row.name,
            row.images,
            f"{row.parameters:,}",
            row.spread,
            f"{row.images_per_second:,.0f}",
            style="bold" if number == 1 + DISTILLED else None,
            end_section=number == 0,
        )
    console.print(table)
    console.print(
        "Regime: 8x8 digits. The teacher is a conv net trained on all 1,097 training images with their labels. "
        "The student, an MLP with a tenth of its parameters, has 5 labels a class; KD also lets it ask the teacher "
        "about images without a label, which is where most of the gain comes from. All students train for the same "
        "number of steps; KD is 0.1 CE + 0.9 KL at temperature 4. ± is the standard deviation over seeds; one "
        "network's accuracy on 500 images is itself uncertain by about 1 point.",
        highlight=False,
    )


def _misread(students: list[list[Trained]], count: int = 12) -> list[tuple[Tensor, int, int, int]]:
    """The first test images that the first seed's baseline and distilled students read differently.

    Each as (image `[8, 8]`, label, baseline's answer, distilled student's answer).
    """
    import torch

    from visiondistill.data import Digits
    from visiondistill.models import evaluating

    test = Digits("test").rows(torch.arange(500))
    answers = []
    for arm in (BASELINE, DISTILLED):
        network = students[arm][0].network
        with evaluating(network), torch.no_grad():
            answers.append(network(test["image"].to(network.scale.device)).logits.argmax(1).cpu())
    differ = (answers[0] != answers[1]).nonzero().flatten()[:count]
    return [
        (test["image"][i, 0], int(test["label"][i]), int(answers[0][i]), int(answers[1][i])) for i in differ.tolist()
    ]


def _plot(rows: Sequence[Row], misread: Sequence[tuple[Tensor, int, int, int]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    _plot_accuracy(left.subplots(), rows)
    _plot_digits(right, misread)
    figure.savefig(path)


INK, GREY, LOW, HIGH = "#22303c", "#9aa5ae", "#c8553d", "#2a7f9e"


def _plot_accuracy(axes: Any, rows: Sequence[Row]) -> None:
    teacher, students = rows[0], rows[1:]
    colours = [HIGH if arm.teacher else LOW if n == BASELINE else GREY for n, arm in enumerate(ARMS)]
    for place, (row, colour) in enumerate(zip(students, colours, strict=True)):
        values = [100 * value for value in row.accuracy]
        axes.axhline(place, color=GREY, linewidth=0.6, alpha=0.5, zorder=0)
        axes.plot([mean(values)] * 2, [place - 0.2, place + 0.2], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=8, alpha=0.55, markeredgewidth=0)
        axes.text(mean(values), place - 0.26, row.spread, color=colour, ha="right", va="bottom", weight="bold")
    reference = 100 * teacher.accuracy[0]
    axes.axvline(reference, color=INK, linestyle=":", linewidth=1.3)
    axes.text(reference - 0.3, len(students) - 0.55, f"teacher {reference:.1f}", color=INK, ha="right", va="center")
    axes.set_yticks(range(len(students)), [f"{row.name}\n{row.images}" for row in students], color=INK)
    axes.set_xlim(min(100 * min(row.accuracy) for row in students) - 2, 100.5)
    axes.set_ylim(len(students) - 0.35, -0.7)
    axes.set_xlabel("test accuracy in %: a dot per seed, a bar at the mean", color=INK)
    axes.set_title(
        f"One student of {students[0].parameters:,} parameters, taught in four ways", loc="left", color=INK, fontsize=11
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _plot_digits(figure: Any, misread: Sequence[tuple[Tensor, int, int, int]]) -> None:
    figure.suptitle(
        f"The first {len(misread)} test digits that two students read differently:\n"
        "taught by 50 labels (red), and by KD on all images (blue)",
        color=INK,
        fontsize=11,
        x=0.04,
        ha="left",
    )
    grid = figure.subplots(3, 4, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, label, before, after) in zip(grid.flat, misread, strict=False):
        axes.imshow(image, cmap="Greys", vmin=0, vmax=1)
        for place, answer, colour in ((0.28, before, LOW), (0.72, after, HIGH)):
            mark = "✓" if answer == label else "✗"
            axes.text(
                place,
                -0.06,
                f"{answer} {mark}",
                transform=axes.transAxes,
                color=colour,
                ha="center",
                va="top",
                fontsize=10,
                weight="bold" if answer == label else "normal",
            )
