"""Everything that one evaluation says about a classifier, as numbers, tables and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from visiondistill.engine.state import write_text
from visiondistill.eval.calibration import fit_temperature
from visiondistill.eval.classify import Answers, Judged, Scores, collect
from visiondistill.eval.identity import preprocessing, weights_hash
from visiondistill.models import as_network

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Calibrated:
    """Temperature scaling: fitted on validation, measured on the test data.

    Attributes:
        temperature: that the logits are divided by.
        fitted_on: validation images it was fitted on.
        nll, ece: of the test data afterwards.
    """

    temperature: float
    fitted_on: int
    nll: float
    ece: float


@dataclass(frozen=True)
class Compared:
    """A teacher on the same images.

    Attributes:
        accuracy, nll: the teacher's own, over the labelled images.
        agreement: share of all images, labelled or not, that both answer alike.
        count: those images.
        weights_sha256: the teacher's.
    """

    accuracy: float
    nll: float
    agreement: float
    count: int
    weights_sha256: str


@dataclass(frozen=True)
class ClassScores:
    """One class: its images, the share answered right, the share of its answers that are right, and
    what its images are most often taken for (None where all are right)."""

    name: str
    count: int
    recall: float | None
    precision: float | None
    taken_for: str | None


@dataclass(frozen=True)
class AccuracyReport:
    """What `accuracy_report` measured.

    Attributes:
        scores: of the network.
        calibrated: after temperature scaling; None without validation data.
        teacher: None without a teacher.
        classes: their names, in the order of the labels.
        unlabelled: images that were left out of the scores.
        weights: which ("EMA", "raw" ...) and their sha256.
        data: description of the data set, as the caller gave it.
        preprocessing: see `identity.preprocessing`.
        answers: the logits behind it all.
    """

    scores: Scores
    calibrated: Calibrated | None
    teacher: Compared | None
    classes: tuple[str, ...]
    unlabelled: int
    weights: dict[str, Any]
    data: dict[str, Any]
    preprocessing: dict[str, Any]
    answers: Answers = field(repr=False)

    @cached_property
    def confusion(self) -> Tensor:
        """int64 `[K, K]`: images of class (row) that were answered as class (column)."""
        judged, size = self.answers.judge(), len(self.classes)
        return (judged.label * size + judged.answer).bincount(minlength=size * size).view(size, size)

    @cached_property
    def per_class(self) -> tuple[ClassScores, ...]:
        """Scores of each class, in the order of the labels; None where a share is of no image."""
        confusion = self.confusion
        errors = confusion - confusion.diag().diag()
        rows = zip(self.classes, confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
        return tuple(
            ClassScores(
                name=name,
                count=count,
                recall=confusion[k, k].item() / count if count else None,
                precision=confusion[k, k].item() / answered if answered else None,
                taken_for=self.classes[int(errors[k].argmax())] if errors[k].any() else None,
            )
            for k, (name, count, answered) in enumerate(rows)
        )

    def judged(self, calibrated: bool = False) -> Judged:
        """The labelled images, before or after temperature scaling.

        Raises:
            ValueError: there was no validation data to fit a temperature on.
        """
        if calibrated and self.calibrated is None:
            raise ValueError("no temperature was fitted: give accuracy_report validation data (val=...)")
        return self.answers.judge(self.calibrated.temperature if calibrated else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, complete: a figure never stands without n, weights, data and preprocessing."""
        return {
            "n": self.scores.count,
            "unlabelled": self.unlabelled,
            "num_classes": len(self.classes),
            **{name: value for name, value in asdict(self.scores).items() if name != "count"},
            "accuracy_standard_error": standard_error(self.scores),
            "calibrated": asdict(self.calibrated) if self.calibrated else None,
            "teacher": asdict(self.teacher) if self.teacher else None,
            "weights": self.weights,
            "data": self.data,
            "preprocessing": self.preprocessing,
            "per_class": [asdict(row) for row in self.per_class],
        }

    def table(self) -> Table:
        """The figures of the whole set, for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.scores.count:,} images", title_justify="left")
        for name in ("", "network", *(("teacher",) if self.teacher else ())):
            table.add_column(name, justify="left" if not name else "right")
        spread = f" ± {standard_error(self.scores):.2%}"
        rows = [("top-1", f"{self.scores.accuracy:.2%}{spread}", self.teacher and f"{self.teacher.accuracy:.2%}")]
        if self.scores.top5 is not None:
            rows.append(("top-5", f"{self.scores.top5:.2%}", ""))
        rows.append(("NLL", f"{self.scores.nll:.4f}", self.teacher and f"{self.teacher.nll:.4f}"))
        rows.append(("ECE", f"{self.scores.ece:.2%}", ""))
        if self.calibrated:
            how = f"at temperature {self.calibrated.temperature:.3f}"
            rows += [(f"NLL {how}", f"{self.calibrated.nll:.4f}", ""), (f"ECE {how}", f"{self.calibrated.ece:.2%}", "")]
        if self.teacher:
            rows.append(("agreement with the teacher", f"{self.teacher.agreement:.2%}", ""))
        for row in rows:
            table.add_row(*(row if self.teacher else row[:2]))
        return table

    def class_table(self, most: int = 10) -> Table:
        """The `most` classes that are recognised worst, for a terminal."""
        from rich.table import Table

        worst = sorted((row for row in self.per_class if row.count), key=lambda row: row.recall)[:most]
        table = Table(title=f"the {len(worst)} hardest of {len(self.classes)} classes", title_justify="left")
        for name in ("class", "images", "recall", "precision", "most often taken for"):
            table.add_column(name, justify="left" if name.startswith(("class", "most")) else "right")
        for row in worst:
            table.add_row(row.name, f"{row.count}", _share(row.recall), _share(row.precision), row.taken_for or "-")
        return table

    def write(self, folder: str | Path, plots: bool = True) -> Path:
        """Write accuracy.json, per_class.csv and, as `plots`, confusion.png and reliability.png; returns the folder.

        With several processes let the first one write.
        """
        from visiondistill.eval.plots import draw_confusion, draw_reliability

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "accuracy.json", json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, ["name", "count", "recall", "precision", "taken_for"])
            rows.writeheader()
            rows.writerows(asdict(row) for row in self.per_class)
        if plots:
            draw_confusion(self, folder / "confusion.png")
            draw_reliability(self, folder / "reliability.png")
        return folder


def accuracy_report(
    model: nn.Module,
    data: Any,
    *,
    val: Any = None,
    teacher: nn.Module | None = None,
    classes: Sequence[str] = (),
    data_info: Mapping[str, Any] | None = None,
    weights: str = "as given",
    crop_pct: float = 1.0,
    crop_mode: str = "squash",
    batch_size: int = 256,
    workers: int = 0,
) -> AccuracyReport:
    """Measure a classifier on a data set.

    With several processes every one of them must call it; all get the whole report.

    Args:
        model: a `Network`, or any classifier of pixels in [0, 1].
        data: what is measured on: the test split, once.
        val: other data, on which the temperature is fitted; None leaves calibration as it is.
        teacher: for agreement; it prepares the same images in its own way.
        classes: names in the order of the labels; numbers where none are given.
        data_info: what the data are (`describe()` of their source, split), kept with the figures.
        weights: which weights the model holds, in a word: "EMA", "raw", "pretrained" ...
        crop_pct, crop_mode: of the data source, see `identity.preprocessing`.
        batch_size, workers: how data are read; the result does not depend on them.

    Raises:
        ValueError: `val` is `data`, names and classes differ in number, or as `collect`.
    """
    if val is data:
        raise ValueError("val is the test data itself: a temperature fitted there would flatter; give the val split")
    network = as_network(model)
    answers = collect(network, data, batch_size, workers)
    names = _named(classes, answers.logits.shape[1])
    return AccuracyReport(
        scores=answers.scores(),
        calibrated=None if val is None else _calibrated(answers, collect(network, val, batch_size, workers)),
        teacher=None if teacher is None else _compared(answers, teacher, data, batch_size, workers),
        classes=names,
        unlabelled=int((answers.label < 0).sum()),
        weights={"which": weights, "sha256": weights_hash(network)},
        data={"type": type(data).__name__, "images": len(data), **(data_info or {})},
        preprocessing=preprocessing(network, crop_pct=crop_pct, crop_mode=crop_mode),
        answers=answers,
    )


def standard_error(scores: Scores) -> float:
    """Of the accuracy, as a share of `count` images drawn independently."""
    return (scores.accuracy * (1 - scores.accuracy) / scores.count) ** 0.5


def _calibrated(answers: Answers, validation: Answers) -> Calibrated:
    temperature = fit_temperature(validation)
    after = answers.scores(temperature)
    return Calibrated(temperature, int((validation.label >= 0).sum()), after.nll, after.ece)


def _compared(answers: Answers, teacher: nn.Module, data: Any, batch_size: int, workers: int) -> Compared:
    theirs = collect(teacher, data, batch_size, workers)
    if theirs.logits.shape[1] != answers.logits.shape[1]:
        raise ValueError(
            f"the teacher tells {theirs.logits.shape[1]} classes apart, the network {answers.logits.shape[1]}: "
            f"their answers cannot be compared"
        )
    own = theirs.scores()
    alike = (theirs.logits.argmax(1) == answers.logits.argmax(1)).double().mean().item()
    return Compared(own.accuracy, own.nll, alike, len(theirs.label), weights_hash(teacher))


def _named(classes: Sequence[str], count: int) -> tuple[str, ...]:
    if classes and len(classes) != count:
        raise ValueError(
            f"there are names for {len(classes)} classes ({', '.join(classes[:3])} ...), but the network tells "
            f"{count} apart"
        )
    return tuple(map(str, classes)) or tuple(map(str, range(count)))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
