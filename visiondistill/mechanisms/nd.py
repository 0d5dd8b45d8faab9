"""Whether norm and direction (KD++) change what they are for: lengths and directions of the student's features.

    python -m visiondistill.mechanisms.nd --seeds 3 --output runs/nd --data DATA/cifar10

The arms `kd`, `dkd`, `dist` and `reviewkd` of the comparison `cifar16`, with and without the term
`NormDirection`, paired seeds. For each run, on test images: accuracy; length of the student's embedding over that
of the teacher's; its cosine to the class's mean teacher embedding over the training images. Both networks'
embeddings are 64 wide, so that the term has no adapter and acts on the embedding itself, where it is
measured. Finished runs are not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity

from visiondistill.data import Source, in_order
from visiondistill.engine.state import write_text
from visiondistill.eval.plots import INK, PALE, RIGHT, WRONG
from visiondistill.mechanisms.pair import Pair, arguments, configured, trained
from visiondistill.mechanisms.tables import finished, markdown, minus, spread
from visiondistill.models import Network, evaluating
from visiondistill.teachers import LiveTeacher
from visiondistill.teachers.means import class_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASES: dict[str, dict[str, Any]] = {
    "kd": {"method.weighting.weights": {"ce": 1.0, "kd": {"start": 0.0, "end": 1.0, "steps": 117}}},
    "dkd": {},
    "dist": {},
    "reviewkd": {},
}
"""Arms of the comparison, and what is changed in them: KD has the weights and the warm-up of KD++."""
WEIGHT = 2.0
"""Of the term: the published one of KD between CIFAR's ResNets, here for every method."""
WITH = "+nd"
ARMS = tuple(f"{base}{end}" for base in BASES for end in ("", WITH))
FIGURES = {"length": "length over the teacher's", "cosine": "cosine to the class's mean"}


def main() -> None:
    """The command; see the module."""
    given = arguments(__doc__, ARMS, ARMS, "runs/nd")
    pair = Pair.of(given.data, given.teacher)
    means = teacher_means(pair.teacher, pair.source)
    for seed in given.seeds:
        for arm in given.arms:
            print(f"{arm}, seed {seed}: {measured(arm, seed, pair, means, given.output)}", flush=True)
    if given.only_seed is None:
        own = directions(pair.teacher, pair.teacher, means, pair.source.test())
        print(f"teacher: cosine {own['cosine'].mean():.3f}")
        print(table(given.output, given.arms, given.seeds))
        draw(given.output, given.arms, given.seeds, own)


def changes(arm: str) -> tuple[str, dict[str, Any]]:
    """The comparison's arm, and what is changed in it: in every second arm, one term more."""
    base = arm.removesuffix(WITH)
    if arm == base:
        return base, BASES[base]
    term = {"class_path": "visiondistill.terms.NormDirection"}
    return base, BASES[base] | {"method.terms.nd": term, "method.weighting.weights.nd": WEIGHT}


def teacher_means(teacher: Network, source: Source) -> Tensor:
    """Mean embedding of every class over the training images, `[K, D]`, as the term has it."""
    asked = LiveTeacher(teacher)
    asked.embedding = True
    absent = torch.zeros(len(source.classes), teacher.embedding_size())
    return class_means(asked, source.train(), lambda targets: targets["embedding"], absent)


def measured(arm: str, seed: int, pair: Pair, means: Tensor, folder: Path) -> dict[str, float]:
    """One run: its accuracy and mean figures, kept in `result.json`, and those of every image in `features.pt`."""
    place = folder / f"{arm}_{seed}"
    file = place / "result.json"
    if file.is_file():
        return json.loads(file.read_text("utf-8"))
    student, _, accuracy = trained(configured(*changes(arm)), pair.source, pair.teacher, place, seed)
    found = directions(student, pair.teacher, means, pair.source.test())
    torch.save(found, place / "features.pt")
    told = {"accuracy": accuracy} | {name: values.mean().item() for name, values in found.items()}
    write_text(file, json.dumps(told))
    return told


@torch.no_grad()
def directions(student: Network, teacher: Network, means: Tensor, data: Any) -> dict[str, Tensor]:
    """Length and cosine of the student's embedding of every image, each `[N]`; see the module.

    Args:
        student, teacher: with embeddings of one width D.
        means: `[K, D]`.
        data: as of `data.in_order`, with "image" and "label".
    """
    columns = []
    for batch in in_order(data, 256):
        with evaluating(student, teacher):
            ours, theirs = (net(batch["image"], embedding=True).embedding for net in (student, teacher))
        length = vector_norm(ours, dim=1) / vector_norm(theirs, dim=1)
        columns.append((length, cosine_similarity(ours, means[batch["label"]])))
    return {name: torch.cat(column) for name, column in zip(FIGURES, zip(*columns, strict=True), strict=True)}


def table(folder: Path, arms: Iterable[str], seeds: Iterable[int]) -> str:
    """The finished runs as Markdown: means and standard deviations; paired differences to the same without the term."""
    header = ["arm", "accuracy %", "minus without", "length", "minus without", "cosine", "minus without"]
    rows = []
    for arm in arms:
        ours, base = finished(folder, arm, seeds), finished(folder, arm.removesuffix(WITH), seeds)
        figures = {"accuracy": (100, 2), "length": (1, 3), "cosine": (1, 3)}
        row = [(spread(ours, f, *how), minus(ours, base, f, *how) if WITH in arm else "") for f, how in figures.items()]
        rows.append([arm, *(cell for pair in row for cell in pair)])
    return markdown(header, rows)


def draw(folder: Path, arms: Iterable[str], seeds: Iterable[int], teacher: dict[str, Tensor]) -> None:
    """`features.png`: a row for each method, with and without the term, all finished seeds together.

    Args:
        teacher: `directions` of the teacher itself.
    """
    from matplotlib.figure import Figure

    files = {arm: [folder / f"{arm}_{seed}" / "features.pt" for seed in finished(folder, arm, seeds)] for arm in arms}
    found = {arm: [torch.load(path, weights_only=True) for path in paths] for arm, paths in files.items() if paths}
    shown = list(dict.fromkeys(arm.removesuffix(WITH) for arm in found))
    if not shown:
        return
    figure = Figure(figsize=(9.6, 0.6 + 1.9 * len(shown)), dpi=130, layout="constrained")
    rows = figure.subplots(len(shown), 2, sharex="col", squeeze=False)
    # Of the longest hundredth the picture would be mostly empty.
    longest = torch.cat([each["length"] for runs in found.values() for each in runs]).quantile(0.99).item()
    ranges = {"length": (0.0, max(longest, 1.1)), "cosine": (-0.1, 1.0)}
    for row, base in zip(rows, shown, strict=True):
        for axes, name in zip(row, FIGURES, strict=True):
            for arm, colour in ((base, WRONG), (base + WITH, RIGHT)):
                if arm in found:
                    _histogram(axes, arm, torch.cat([each[name] for each in found[arm]]), ranges[name], colour)
            _finish(axes, teacher[name].mean().item())
        row[0].set_ylabel("density")
    for axes, name in zip(rows[-1], FIGURES, strict=True):
        axes.set_xlabel(f"{FIGURES[name]} (dashed: the teacher itself)")
    figure.savefig(folder / "features.png")


def _histogram(axes: Axes, arm: str, values: Tensor, within: tuple[float, float], colour: str) -> None:
    label = f"{arm}: mean {values.mean():.2f}"
    style = {"density": True, "histtype": "step", "linewidth": 1.6, "color": colour}
    axes.hist(values.numpy(), bins=60, range=within, label=label, **style)


def _finish(axes: Axes, teacher: float) -> None:
    axes.axvline(teacher, color=PALE, linewidth=1.2, linestyle="--")
    axes.legend(loc="best", frameon=False, fontsize=9)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
