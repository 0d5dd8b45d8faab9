"""Whether labels and raw logits hurt each other on one classifier, and two classifiers repair it (DHKD's claim).

    python -m visiondistill.mechanisms.dhkd --seeds 3 --output runs/dhkd --data DATA/cifar100 --teacher FILE

FILE holds the logits of a teacher of CIFAR-100, the recipes `measured/dhkd_*` are the arms, seeds are paired. For
each run: test accuracy and, where both losses are there, the cosine of their gradients on the trunk below the
classifiers, ten times during the training. Finished runs are not done again. Runs need nothing of each other:
each may have a process of its own (`--arms ARM --only-seed N`); the same command without `--only-seed` then makes
the table and the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call

from visiondistill import Distiller, recipes
from visiondistill.data import Source
from visiondistill.distiller import TRAIN, StudentSide
from visiondistill.engine import train
from visiondistill.engine.state import write_text
from visiondistill.eval import evaluate
from visiondistill.eval.plots import INK, RIGHT, WRONG
from visiondistill.mechanisms.tables import finished, markdown, minus, spread

ARMS = ("ce", "kd", "logits", "both", "both_light", "dual", "aligned")
"""Labels; labels and KD; BinaryKL-Norm; labels and BinaryKL-Norm on one classifier, on one with a tenth of the weight
(which tells a conflict from a weight that is too large), on two, on two with alignment."""
LOSSES, COSINE = ("ce", "logits"), "trunk/cosine"
PARTS, PART = 4, 128
"""Batches of training images whose cosines are averaged at each look, and images in each, as many as in a step."""


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of CIFAR-100's parquet files")
    parser.add_argument("--teacher", required=True, help="file of its stored logits, see teachers.Stored")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="run this seed alone, without table and picture")
    parser.add_argument("--output", type=Path, default=Path("runs/dhkd"))
    given = parser.parse_args()
    seeds = range(given.seeds) if given.only_seed is None else [given.only_seed]
    source = None
    for seed in seeds:
        for arm in given.arms:
            if not (given.output / f"{arm}_{seed}" / "result.json").is_file():
                source = source or recipes.source_of(_config(arm, {"data.root": given.data}))
                found = measured(arm, seed, source, given.teacher, given.output)
                print(f"{arm}, seed {seed}: {found}", flush=True)
    if given.only_seed is None:
        print(table(given.output, given.arms, seeds))
        draw(given.output, given.arms, seeds)


def measured(arm: str, seed: int, source: Source, teacher: str, folder: Path) -> dict[str, float]:
    """One run: its figures, kept in `result.json`.

    Raises:
        KeyboardInterrupt: a signal ended it.
    """
    place = folder / f"{arm}_{seed}"
    own = {"run.seed": seed, "run.output_dir": str(place), "run.resume": "auto"}
    config = _config(arm, own | {"run.device": "cpu", "run.progress": False})
    if "teacher" in config:
        config = recipes.override(config, {"teacher.file": teacher})
    plan = recipes.plan(config, source=source)
    method = plan.stages[0].method

    def watch(product: nn.Module, step: int) -> Mapping[str, float]:
        return {COSINE: cosine(method)} if set(LOSSES) <= set(method.terms) else {}

    started = perf_counter()
    result = train(plan.stages, plan.run, watch=watch)
    if result.reason != "finished":
        raise KeyboardInterrupt(f"{result.reason} in {place}")
    found = {"accuracy": evaluate(result.product.eval(), source.test()).accuracy, "seconds": perf_counter() - started}
    if looks := cosines(place):
        found["cosine"] = statistics.fmean(looks.values())
    write_text(place / "result.json", json.dumps(found))
    return found


def cosine(method: Distiller) -> float:
    """Mean cosine of the gradients of `ce` and `logits` on the student below its classifier.

    The training images are the same at every look, spread over the set and as they are.
    """
    data = method.streams[TRAIN].data
    rows = torch.linspace(0, len(data) - 1, PARTS * PART).long()
    found = []
    for part in rows.view(PART, PARTS).unbind(1):
        batch = data.rows(part)
        ce, logits = gradients(method, {TRAIN: batch, "teacher": method.parts["teacher"].targets(batch)})
        found.append(nn.functional.cosine_similarity(ce, logits, dim=0).item())
    return statistics.fmean(found)


def gradients(method: Distiller, batch: dict) -> tuple[Tensor, Tensor]:
    """Of the means of `ce` and `logits` on one prepared batch, each `[P]`, over the P parameters of the trunk.

    As in the student's turn, normalised by the batch, whose statistics go into copies.
    """
    side = StudentSide(dict(method.players), method.values).train()
    student = method.players["student"]
    heads = {id(p) for p in student.model.get_classifier().parameters()}
    trunk = {
        f"players.student.{name}": p.detach().requires_grad_()
        for name, p in student.named_parameters()
        if id(p) not in heads
    }
    buffers = {name: buffer.clone() for name, buffer in side.named_buffers()}
    with torch.enable_grad():
        values, _ = functional_call(side, trunk | buffers, (batch,))
        both = [torch.autograd.grad(values[name].mean(), list(trunk.values()), retain_graph=True) for name in LOSSES]
    ce, logits = (torch.cat([each.flatten() for each in own]) for own in both)
    return ce, logits


def cosines(run: Path) -> dict[int, float]:
    """The cosine at every look of a run, by step; empty for a run with one loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line[COSINE] for line in lines if COSINE in line}


def table(folder: Path, arms: Iterable[str], seeds: Iterable[int]) -> str:
    """The finished runs as Markdown: means and standard deviations; paired differences to the single classifier."""
    single = finished(folder, "both", seeds)
    rows = []
    for arm in arms:
        runs = finished(folder, arm, seeds)
        less = "" if arm == "both" else minus(runs, single, "accuracy", 100)
        rows.append([arm, spread(runs, "accuracy", 100), less, spread(runs, "cosine", digits=3), str(len(runs))])
    return markdown(["arm", "accuracy %", "minus both", "cosine on the trunk", "seeds"], rows)


def draw(folder: Path, arms: Iterable[str], seeds: Iterable[int]) -> None:
    """`dhkd.png`: the accuracy of every finished run, and the cosines over the steps."""
    from matplotlib.figure import Figure

    found = {arm: runs for arm in arms if (runs := finished(folder, arm, seeds))}
    figure = Figure(figsize=(10, 0.9 + 0.45 * max(len(found), 5)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, runs in enumerate(found.values()):
        points = [100 * run["accuracy"] for run in runs.values()]
        left.plot(points, [place] * len(points), "o", color=RIGHT, alpha=0.4, markersize=5)
        left.plot(statistics.fmean(points), place, "|", color=INK, markersize=18, markeredgewidth=2)
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set_xlabel("test accuracy %; bars: means of the seeds")
    for arm, colour in (("both", WRONG), ("dual", RIGHT), ("aligned", INK)):
        for number, seed in enumerate(found.get(arm, ())):
            looks = cosines(folder / f"{arm}_{seed}")
            right.plot(looks.keys(), looks.values(), color=colour, alpha=0.7, label="" if number else arm)
    right.axhline(0, color=INK, linewidth=0.8)
    right.set(xlabel="step", ylabel="cosine of the two gradients")
    if right.lines[1:]:
        right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "dhkd.png")


def _config(arm: str, changes: Mapping[str, object]) -> recipes.Config:
    return recipes.override(recipes.load(f"measured/dhkd_{arm}"), changes)


if __name__ == "__main__":
    main()
