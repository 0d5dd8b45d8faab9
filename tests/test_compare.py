"""`visiondistill compare`: equal budgets, paired seeds, nothing redone, intervals that are right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from visiondistill.cli import main
from visiondistill.compare import Measured, half_width, load, summarize, table
from visiondistill.data import EmbeddedDigits
from visiondistill.models import SmallConvNet
from visiondistill.schema import RecipeError
from visiondistill.workbench import distill

NETWORK = "visiondistill.models.SmallConvNet"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison on the embedded digits, with a teacher trained for it."""
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    settings = {"steps": 150, "optim__student__lr": 1e-2, "run__output_dir": str(folder / "teacher")}
    settings |= {"run__progress": False, "run__device": "cpu"}
    distill(SmallConvNet([16, 32], "batch"), None, EmbeddedDigits(), recipe="finetune", **settings)
    teacher = {"class_path": NETWORK, "init_args": {"widths": [16, 32], "norm": "batch"}}
    content = {
        "pair": {
            "data": {"class_path": "visiondistill.data.EmbeddedDigits"},
            "student": {"class_path": NETWORK, "init_args": {"widths": [6, 8], "norm": "batch"}},
            "teacher": {
                "class_path": "visiondistill.models.ClassPath",
                "init_args": teacher | {"weights": str(folder / "teacher" / "export" / "model.safetensors")},
            },
            "steps": 40,
            "optim": {"student": {"lr": 0.01, "warmup": 0}},
            "run": {"batch_size": 32, "log_every": 10, "device": "cpu", "evaluate_every": None},
        },
        "arms": {
            "ce": {"recipe": "ce"},
            "kd": {"recipe": "kd"},
            "soft": {"recipe": "kd", "changes": {"method.weighting.weights": {"ce": 0.0, "kd": 1.0}}},
        },
        "reference": "kd",
        "seeds": 2,
        "output_dir": str(folder / "out"),
    }
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_arms_are_run_measured_and_not_run_again(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "--file", str(file)]) == 0
    out = file.parent / "out"
    assert {path.name for path in out.iterdir()} == {
        *("ce", "kd", "soft"),
        *("compare.json", "compare.md", "compare.png"),
    }
    arms = {arm["name"]: arm for arm in json.loads((out / "compare.json").read_text())["arms"]}
    assert all(len(arm["runs"]) == 2 for arm in arms.values())
    assert arms["ce"]["cost"] == 1.0
    assert arms["kd"]["difference"] is None
    assert 0 < arms["kd"]["agreement"] <= 1
    told = capsys.readouterr().out
    assert "kd, seed 1" in told
    assert "minus kd" in told
    assert (out / "compare.md").read_text().count("|\n") == 5
    before = {path: path.stat().st_mtime_ns for path in out.rglob("accuracy.json")}
    assert len(before) == 6
    assert main(["compare", "--file", str(file)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("accuracy.json")} == before
    # One more seed is three more runs.
    assert main(["compare", "--file", str(file), "--seeds", "3"]) == 0
    after = {path: path.stat().st_mtime_ns for path in out.rglob("accuracy.json")}
    assert len(after) == 9
    assert before.items() <= after.items()


def test_a_seed_gives_every_arm_the_same_student_and_order(file: Path) -> None:
    arms = load(file, {"seeds": 1}).arms
    assert {arm: config["steps"] for arm, config in arms.items()} == dict.fromkeys(arms, 40)
    from visiondistill import recipes

    built = [recipes.plan(recipes.override(config, {"run.seed": 5})) for config in arms.values()]
    students = [plan.student.state_dict() for plan in built]
    assert all(torch.equal(students[0][key], other[key]) for other in students[1:] for key in students[0])


def test_finished_runs_with_other_settings_are_refused(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "--file", str(file), "--seeds", "1"]) == 0
    assert main(["compare", "--file", str(file), "--steps", "41"]) == 2
    assert "steps was 40, is 41" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["kdd"]}, "did you mean 'kd'"),
        ({"arms": ["ce"]}, "reference: 'kd' is not among"),
        ({"seeds": -1}, "seeds"),
        ({"optim.student.lrr": 1}, r"arms.ce: optim.student.lrr"),
    ],
)
def test_wrong_changes_are_named(file: Path, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(file, changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arm": {}}, "arm: a comparison has"),
        ({"arms": {}}, "name at least one"),
        ({"arms": {"a": "kd"}, "reference": "a", "seeds": 1}, r"arms.a: expected a recipe"),
        ({"arms": {"a": {"recipe": "kdd"}}, "reference": "a", "seeds": 1}, "no recipe 'kdd'"),
        ({"arms": {"a": {"recipe": "smoke/kd"}}, "reference": "a", "seeds": 1}, "several stages"),
    ],
)
def test_wrong_files_are_named(content: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        load(path)


def test_an_unknown_comparison_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="no comparison 'nothing'"):
        load("nothing")


def one(accuracy: float, rate: float = 100.0) -> Measured:
    return Measured(accuracy, 1.0, 0.1, None, rate)


def test_differences_are_paired_and_costs_relative() -> None:
    measured = {
        "ce": [one(0.50, 200), one(0.60, 220), one(0.70, 180)],
        "kd": [one(0.53, 100), one(0.62, 110), one(0.74, 90)],
    }
    ce, kd = summarize(measured, "ce")
    assert ce.difference is None
    assert kd.difference == pytest.approx(0.03)
    # The spread of the accuracies is ten times that of the differences: pairing is what makes them visible.
    assert kd.half_width == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert kd.spread == pytest.approx(math.sqrt(0.0111))
    assert kd.cost == pytest.approx(2.0)
    assert "±" in "".join(str(cell) for column in table([ce, kd], "ce").columns for cell in column.cells)


def test_one_seed_has_no_interval() -> None:
    assert half_width([0.3]) is None
    (kd,) = summarize({"kd": [one(0.5)]}, "kd")
    assert kd.spread is None
