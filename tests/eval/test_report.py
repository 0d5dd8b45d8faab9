"""A report's figures agree with one another and carry what they need to be read."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image
from test_classify import Table, numbered, random_answers

from visiondistill.data import Digits
from visiondistill.eval import Answers, accuracy_report, preprocessing, weights_hash
from visiondistill.models import Network, SmallConvNet

NAMES = [f"class {number}" for number in range(12)]


@pytest.fixture(scope="module")
def report():
    answers = random_answers()
    return accuracy_report(
        Table(answers.logits),
        numbered(answers),
        val=numbered(random_answers(seed=1)),
        teacher=Table(random_answers(seed=2).logits),
        classes=NAMES,
        data_info={"split": "test"},
        weights="EMA",
    )


def test_confusion_and_classes_add_up(report):
    confusion, scores = report.confusion, report.scores
    assert confusion.sum() == scores.count
    assert confusion.diag().sum() == scores.correct
    assert torch.equal(confusion.sum(1), report.answers.label.bincount(minlength=12))
    assert sum(row.recall * row.count for row in report.per_class) == pytest.approx(scores.correct)
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    theirs = multiclass_confusion_matrix(report.answers.logits, report.answers.label, 12)
    assert torch.equal(confusion, theirs)


def test_each_class_says_what_it_is_taken_for():
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 0, 9, 0], [0, 0, 9, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
    answers = Answers(logits, torch.tensor([0, 1, 1, 1, 2]))
    rows = accuracy_report(Table(logits), numbered(answers), classes=list("abcd")).per_class
    assert [row.count for row in rows] == [1, 3, 1, 0]
    assert [row.recall for row in rows] == [1, pytest.approx(1 / 3), 1, None]
    assert [row.precision for row in rows] == [1, 1, pytest.approx(1 / 3), None]
    assert [row.taken_for for row in rows] == [None, "c", None, None]


def test_the_written_report_is_complete(report, tmp_path):
    folder = report.write(tmp_path / "eval")
    written = json.loads((folder / "accuracy.json").read_text())
    assert written["n"] == 400
    assert written["accuracy"] == report.scores.accuracy
    assert written["weights"]["which"] == "EMA"
    assert len(written["weights"]["sha256"]) == 64
    assert written["data"] == {"type": "TensorData", "images": 400, "split": "test"}
    assert written["preprocessing"]["crop_mode"] == "squash"
    assert written["calibrated"]["fitted_on"] == 400
    assert written["teacher"]["count"] == 400
    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == NAMES
    assert float(rows[3]["recall"]) == report.per_class[3].recall
    for name in ("confusion.png", "reliability.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_pictures_of_many_and_of_few_classes_can_be_drawn(tmp_path):
    for classes in (2, 3, 160):
        answers = random_answers(rows=500, classes=classes)
        accuracy_report(Table(answers.logits), numbered(answers)).write(tmp_path / str(classes))
    perfect = Answers(10 * torch.eye(3), torch.arange(3))
    accuracy_report(Table(perfect.logits), numbered(perfect)).write(tmp_path / "perfect")


def test_tables_show_the_figures(report):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(), report.class_table(3))
    text = console.export_text()
    worst = min(report.per_class, key=lambda row: row.recall)
    for shown in (f"{report.scores.accuracy:.2%}", f"{report.teacher.agreement:.2%}", "400", worst.name):
        assert shown in text


def test_calibration_is_never_fitted_on_the_test_data():
    answers = random_answers()
    data = numbered(answers)
    with pytest.raises(ValueError, match="would flatter"):
        accuracy_report(Table(answers.logits), data, val=data)
    report = accuracy_report(Table(answers.logits), data)
    assert report.calibrated is None
    with pytest.raises(ValueError, match="no temperature was fitted"):
        report.judged(calibrated=True)


def test_other_classes_are_refused():
    answers, few = random_answers(), random_answers(classes=5)
    with pytest.raises(ValueError, match=r"names for 3 classes .* tells 12 apart"):
        accuracy_report(Table(answers.logits), numbered(answers), classes=list("abc"))
    with pytest.raises(ValueError, match="teacher tells 5 classes apart, the network 12"):
        accuracy_report(Table(answers.logits), numbered(answers), teacher=Table(few.logits))


def test_a_teacher_agrees_with_itself():
    net = SmallConvNet()
    found = accuracy_report(net, Digits("val"), teacher=net).teacher
    assert found.agreement == 1
    assert found.weights_sha256 == weights_hash(net)


def test_the_hash_is_the_weights_and_nothing_else():
    torch.manual_seed(0)
    net = SmallConvNet(norm="batch")
    wrapped = Network(net, [0.5], [0.5], (1, 8, 8))
    assert weights_hash(net) == weights_hash(wrapped)
    before = weights_hash(net)
    with torch.no_grad():
        net.head.weight.view(torch.int32)[0, 0] ^= 1
    assert weights_hash(net) != before
    with torch.no_grad():
        net.head.weight.view(torch.int32)[0, 0] ^= 1
    assert weights_hash(net) == before


def test_preprocessing_gives_back_the_numbers_of_the_network():
    mean, std = [0.4914, 0.48216, 0.44653], [0.229, 0.224, 0.225]
    found = preprocessing(Network(SmallConvNet(in_channels=3), mean, std, (3, 32, 32), "bicubic"), crop_pct=0.9)
    assert (found["mean"], found["std"]) == (mean, std)
    assert found["input_size"] == [3, 32, 32]
    assert found["interpolation"] == "bicubic"
    assert preprocessing(Network(SmallConvNet()), (3, 8, 8))["std"] == [1.0] * 3
    with pytest.raises(ValueError, match=r"crop_pct=1\.5"):
        preprocessing(Network(SmallConvNet()), crop_pct=1.5)
