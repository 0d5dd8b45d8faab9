"""Whether trilateral weights find out whom not to trust: a teacher that is confidently wrong on a fifth of the images.

    python -m visiondistill.mechanisms.tgeo --seeds 3 --output runs/tgeo --data DATA/cifar10

The arms `kd`, at fixed shares of the teacher, and `tgeo` of the comparison `cifar16`, paired seeds. For each
run: accuracy; of TGeo also alpha, the teacher's share, at the end, for every training image as an evaluation
sees it. The paper's claim is lower alphas where the teacher is not to be trusted. Finished runs are not done
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visiondistill.data import in_order
from visiondistill.engine.method import Batch
from visiondistill.engine.rng import key
from visiondistill.engine.state import write_text
from visiondistill.eval.plots import INK, RIGHT, WRONG
from visiondistill.mechanisms.pair import Pair, arguments, configured, trained
from visiondistill.mechanisms.tables import Runs, finished, markdown, minus, paired, spread
from visiondistill.models import evaluating
from visiondistill.teachers import LiveTeacher
from visiondistill.terms import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from visiondistill import Distiller

FIXED = {f"alpha_{share}": share for share in (0.0, 0.3, 0.5, 0.7, 0.9)}
"""Shares of the teacher by arm; the label has the rest."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "tgeo_no_edges": {"method.weighting.edges": []},
    "tgeo_no_means": {"method.weighting.inter_sample": False},
}
LEARNED: dict[str, dict[str, Any]] = {"tgeo": {}, **ABLATIONS}
ARMS = (*FIXED, *LEARNED)
NET = {"method.weighting.every": 2, "method.weighting.virtual_lr": 1e-3, "optim.weighting_net.lr": 3e-3}
"""More turns of the net, and larger ones, than the recipe has for long runs; and a shorter virtual step.

At a rate of 0.1 it overshoots for this student: the validation loss after it is several times the one before, so
that its gradient says nothing of alpha.
"""
CORRUPTED = 0.2
GROUPS = {"corrupted": INK, "right": RIGHT, "wrong": WRONG}
"""Training images by what the teacher says of them, and their colours: made wrong, right by itself, wrong by itself."""


def main() -> None:
    """The command; see the module."""
    given = arguments(__doc__, ARMS, [*FIXED, "tgeo"], "runs/tgeo")
    pair = Pair.of(given.data, given.teacher)
    for seed in given.seeds:
        for arm in given.arms:
            print(f"{arm}, seed {seed}: {measured(arm, seed, pair, given.output)}", flush=True)
    if given.only_seed is None:
        print(table(given.output, given.arms, given.seeds))
        draw(given.output, given.arms, given.seeds)


class Corrupted(LiveTeacher):
    """A network whose answers to some training images have their classes rotated: as sure as before, and wrong.

    The images are chosen by their number alone, so that every run and every view of them has the same.

    Args:
        network: as of `LiveTeacher`; it says how many classes it tells apart.
        count: of training images.
        share: of them that are corrupted.
    """

    def __init__(self, network: nn.Module, count: int, share: float = CORRUPTED) -> None:
        super().__init__(network)
        generator = torch.Generator().manual_seed(key("corrupted"))
        rows = torch.randperm(count, generator=generator)[: round(share * count)]
        rotation = torch.zeros(count, dtype=torch.int64)
        rotation[rows] = torch.randint(1, self.num_classes, (len(rows),), generator=generator)
        self.register_buffer("rotation", rotation)

    def targets(self, data: Batch) -> dict[str, Any]:
        answers = super().targets(data)
        classes = torch.arange(self.num_classes, device=self.rotation.device)
        source = (classes - self.rotation[data["index"]][:, None]) % self.num_classes
        return answers | {"logits": answers["logits"].gather(1, source)}


def changes(arm: str) -> tuple[str, dict[str, Any]]:
    """The comparison's arm, and what is changed in it."""
    if arm in LEARNED:
        return "tgeo", NET | LEARNED[arm]
    return "kd", {"method.weighting.weights": {"ce": 1 - FIXED[arm], "kd": FIXED[arm]}}


def measured(arm: str, seed: int, pair: Pair, folder: Path) -> dict[str, float]:
    """One run: its accuracy and mean alphas, kept in `result.json`, and all alphas in `alpha.pt`."""
    place = folder / f"{arm}_{seed}"
    file = place / "result.json"
    if file.is_file():
        return json.loads(file.read_text("utf-8"))
    teacher = Corrupted(pair.teacher, len(pair.source.train()))
    _, method, accuracy = trained(configured(*changes(arm)), pair.source, teacher, place, seed)
    found = {"accuracy": accuracy}
    if arm in LEARNED:
        groups = alphas(method, pair.source.train())
        torch.save(groups, place / "alpha.pt")
        found |= {name: alpha.mean().item() for name, alpha in groups.items()}
        found["clean"] = torch.cat([groups["right"], groups["wrong"]]).mean().item()
    write_text(file, json.dumps(found))
    return found


@torch.no_grad()
def alphas(method: Distiller, data: Any) -> dict[str, Tensor]:
    """Alpha of every image of `data` by group, each `[n]`; the teacher is a `Corrupted`."""
    teacher, weighting, student = method.parts["teacher"], method.parts["weighting"], method.players["student"]
    columns = []
    for batch in in_order(data, 256):
        logits = teacher.targets(batch)["logits"]
        with evaluating(student):
            view = View(student(batch["image"]).logits, {"train": batch}, batch["label"], teacher_logits=logits)
        right = logits.argmax(1) == batch["label"]
        columns.append((weighting.shares(view), teacher.rotation[batch["index"]] > 0, right))
    alpha, corrupted, right = (torch.cat(column) for column in zip(*columns, strict=True))
    return {"corrupted": alpha[corrupted], "right": alpha[~corrupted & right], "wrong": alpha[~corrupted & ~right]}


def table(folder: Path, arms: Iterable[str], seeds: Iterable[int]) -> str:
    """The finished runs as Markdown: means and standard deviations, and paired differences."""
    runs = {arm: found for arm in arms if (found := finished(folder, arm, seeds))}
    best = best_fixed(runs)
    header = ["arm", "accuracy %", f"minus {best}", *(f"alpha, {name}" for name in GROUPS)]
    header += ["corrupted minus clean", "wrong minus right"]
    return markdown(header, [_row(arm, found, runs.get(best, {})) for arm, found in runs.items()])


def best_fixed(runs: Mapping[str, Runs]) -> str:
    """The fixed share with the highest mean accuracy: chosen by the test images, which favours it."""
    means = {
        arm: sum(run["accuracy"] for run in found.values()) / len(found) for arm, found in runs.items() if arm in FIXED
    }
    return max(means, key=means.__getitem__, default="the best fixed share")


def _row(arm: str, runs: Runs, best: Runs) -> list[str]:
    row = [arm, spread(runs, "accuracy", 100), "" if runs is best else minus(runs, best, "accuracy", 100)]
    row += [spread(runs, name, digits=3) for name in GROUPS]
    learned = [run for run in runs.values() if "clean" in run]
    for low, high in (("corrupted", "clean"), ("wrong", "right")):
        row.append(paired([run[low] - run[high] for run in learned], digits=3))
    return row


def draw(folder: Path, arms: Iterable[str], seeds: Iterable[int]) -> None:
    """`alpha.png`: how alpha is spread in each group, one panel per learned arm, all finished seeds together."""
    from matplotlib.figure import Figure

    files = {arm: [folder / f"{arm}_{seed}" / "alpha.pt" for seed in finished(folder, arm, seeds)] for arm in LEARNED}
    shown = {arm: files[arm] for arm in arms if files.get(arm)}
    if not shown:
        return
    figure = Figure(figsize=(6.4, 0.6 + 2.6 * len(shown)), dpi=130, layout="constrained")
    column = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (arm, paths) in zip(column, shown.items(), strict=True):
        loaded = [torch.load(path, weights_only=True) for path in paths]
        _histograms(axes, {name: torch.cat([each[name] for each in loaded]) for name in GROUPS})
        axes.set_title(f"{arm}, seeds: {len(paths)}", loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel("alpha, the teacher's share")
    figure.savefig(folder / "alpha.png")


def _histograms(axes: Axes, groups: Mapping[str, Tensor]) -> None:
    highest = max(alpha.max().item() for alpha in groups.values())
    for name, alpha in groups.items():
        label = f"{name}: mean {alpha.mean():.3f}, n = {len(alpha):,}"
        style = {"color": GROUPS[name], "label": label}
        axes.hist(alpha.numpy(), bins=40, range=(0, highest), density=True, histtype="step", linewidth=1.6, **style)
        axes.axvline(alpha.mean().item(), color=GROUPS[name], linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_ylabel("density")
    axes.legend(loc="best", frameon=False, fontsize=9, title="what the teacher says is", title_fontsize=9)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
