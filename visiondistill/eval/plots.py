"""Pictures of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visiondistill.eval.calibration import reliability
from visiondistill.eval.classify import BINS, calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from visiondistill.eval.report import AccuracyReport

RIGHT, WRONG, INK, PALE = "#2166ac", "#c2410c", "#1f2933", "#9aa5b1"
WRITTEN = 20
"""Up to so many classes every cell carries its number."""


def draw_confusion(report: AccuracyReport, path: Path) -> None:
    """The confusion matrix as shares of each true class, beside it the most frequent confusions.

    Blue are right answers, orange wrong ones. Wrong ones have a colour scale of their own, of
    square-root shape: among a hundred classes they would else be too faint to see.
    """
    from matplotlib.figure import Figure

    count = len(report.classes)
    side = min(max(4.5, 0.55 * count), 13.0)
    figure = Figure(figsize=(side + 5.2, side + 1.3), dpi=130, layout="constrained")
    matrix, listing = figure.subplots(1, 2, width_ratios=(side, 3.6))
    counts = report.confusion.double()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    _matrix(matrix, shares, report.classes)
    _confusions(listing, report)
    figure.suptitle(
        f"{report.scores.accuracy:.2%} of {report.scores.count:,} images right, {count} classes",
        x=0.01,
        ha="left",
        color=INK,
        fontsize=14,
        fontweight="bold",
    )
    figure.savefig(path)


def _matrix(axes: Axes, shares: np.ndarray, classes: tuple[str, ...]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    count = len(classes)
    right = LinearSegmentedColormap.from_list("right", ["#ffffff", "#92c5de", RIGHT])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#fdba74", WRONG])
    errors = shares * (1 - np.eye(count))
    most = max(errors.max(), 1e-9)
    colours = wrong(np.sqrt(errors / most))
    colours[np.arange(count), np.arange(count)] = right(shares.diagonal())
    axes.imshow(colours, interpolation="nearest")
    if count <= WRITTEN:
        _numbers(axes, shares, most)
    size = 9 if count <= WRITTEN else min(8.5, 700 / min(count, 130))
    shown = range(0, count, -(-count // 130))
    names = [_short(classes[k]) for k in shown]
    axes.set_xticks(list(shown), names, rotation=90 if count > 10 or max(map(len, names)) > 3 else 0, fontsize=size)
    axes.set_yticks(list(shown), names, fontsize=size)
    axes.set_xlabel("answer", color=INK)
    axes.set_ylabel("truth", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.set_title(
        f"share of each true class: blue right (to 100 %), orange wrong (to {100 * most:.0f} %)",
        loc="left",
        fontsize=9.5,
        color=INK,
    )
    _frame(axes, visible=True)


def _numbers(axes: Axes, shares: np.ndarray, most: float) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.0005:
            dark = share > 0.6 if row == column else share > 0.45 * most
            text = f"{100 * share:.0f}" if share >= 0.0095 else "<1"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color="white" if dark else INK)


def _confusions(axes: Axes, report: AccuracyReport) -> None:
    errors = report.confusion - report.confusion.diag().diag()
    count = len(report.classes)
    listed = 20 if count <= WRITTEN else 40
    most = errors.flatten().topk(min(listed, count * count))
    pairs = [(n, k // count, k % count) for n, k in zip(most.values.tolist(), most.indices.tolist(), strict=True) if n]
    axes.set_title("most frequent confusions: truth, answer, images", loc="left", fontsize=9.5, color=INK)
    _frame(axes, visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(listed, -0.6)
    for place, (images, truth, answer) in enumerate(pairs):
        axes.barh(place, images / pairs[0][0], color=WRONG, alpha=0.22, height=0.78)
        share = images / int(report.confusion[truth].sum())
        label = f"{_short(report.classes[truth])} → {_short(report.classes[answer])}"
        axes.text(0.015, place, label, va="center", fontsize=8.5, color=INK)
        axes.text(0.99, place, f"{images}  ({share:.0%})", va="center", ha="right", fontsize=8.5, color=INK)
    if not pairs:
        axes.text(0.015, 0, "none", va="center", color=PALE)


def draw_reliability(report: AccuracyReport, path: Path) -> None:
    """Accuracy over confidence, before and (where fitted) after temperature scaling."""
    from matplotlib.figure import Figure

    sides: list[tuple[str, bool]] = [("as trained", False)]
    if report.calibrated is not None:
        fitted = f"{report.calibrated.fitted_on:,} validation images"
        sides.append((f"temperature {report.calibrated.temperature:.3f}, fitted on {fitted}", True))
    figure = Figure(figsize=(5.4 * len(sides), 6.0), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(sides), height_ratios=(3.4, 1), sharex=True, squeeze=False)
    for column, (title, calibrated) in enumerate(sides):
        _reliability(axes[0, column], axes[1, column], report, title, calibrated)
    highest = max(axis.get_ylim()[1] for axis in axes[1])
    for axis in axes[1]:
        axis.set_ylim(0, highest)
    figure.savefig(path)


def _reliability(above: Axes, below: Axes, report: AccuracyReport, title: str, calibrated: bool) -> None:
    from matplotlib.colors import to_rgb

    judged = report.judged(calibrated)
    bins = reliability(judged)
    left, width = np.arange(BINS) / BINS, 1 / BINS
    accuracy, confidence, shares = (
        column.numpy() for column in (bins.accuracy, bins.confidence, bins.count / bins.count.sum())
    )
    base = np.nan_to_num(np.minimum(accuracy, confidence))
    above.bar(left, base, width, align="edge", color=RIGHT, edgecolor="white")
    for gap, colour, name in (
        (confidence - accuracy, WRONG, "too confident by"),
        (accuracy - confidence, RIGHT, "not confident enough by"),
    ):
        height = np.nan_to_num(gap).clip(min=0)
        style = {"facecolor": (*to_rgb(colour), 0.22), "edgecolor": colour, "linewidth": 0.6, "hatch": "///"}
        above.bar(left, height, width, bottom=base, align="edge", label=name, **style)
    above.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="perfect calibration")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    above.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    ece, nll = calibration_error(judged.confidence, judged.right).item(), judged.nll.mean().item()
    told = f"ECE {ece:.2%}\nNLL {nll:.4f}\nn = {len(judged.label):,}"
    above.text(0.03, 0.80, told, fontsize=10, color=INK, va="top")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    below.bar(left, shares, width, align="edge", color=PALE, edgecolor="white")
    mean, right = judged.confidence.mean().item(), judged.right.double().mean().item()
    for value, colour, name in ((mean, WRONG, "mean confidence"), (right, RIGHT, "accuracy")):
        below.axvline(value, color=colour, linewidth=1.6, label=f"{name} {value:.1%}")
    below.legend(loc="upper left", frameon=False, fontsize=9)
    below.set(xlabel="confidence", ylabel="share of images")
    for axis in (above, below):
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)


def _frame(axes: Axes, visible: bool) -> None:
    for spine in axes.spines.values():
        spine.set_visible(visible)
        spine.set_color(PALE)


def _short(name: Any, most: int = 22) -> str:
    return str(name) if len(str(name)) <= most else f"{str(name)[: most - 1]}…"
