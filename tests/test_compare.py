"""`visiondistill compare`: equal budgets, paired seeds, nothing redone, intervals that are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from visiondistill.cli import main
from visiondistill.compare import load, run
from visiondistill.data import EmbeddedDigits
from visiondistill.models import SmallConvNet
from visiondistill.schema import RecipeError
from visiondistill.summaries import Measured, half_width, summarize, table
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
    # What a kill has torn is evaluated again.
    torn = out / "ce" / "seed_0" / "evaluation" / "accuracy.json"
    whole = torn.read_text()
    torn.write_text(whole[:40])
    assert main(["compare", "--file", str(file)]) == 0
    assert json.loads(torn.read_text())["accuracy"] == json.loads(whole)["accuracy"]
    before[torn] = torn.stat().st_mtime_ns
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


def with_changes(file: Path, name: str, **content: object) -> Path:
    """The comparison with other content, of 8 steps, and with a folder of its own."""
    whole = yaml.safe_load(file.read_text())
    whole["pair"]["steps"] = 8
    path = file.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(whole | {"output_dir": str(file.parent / name)} | content))
    return path


def configs(folder: Path) -> dict[str, dict]:
    """Of every run, by arm and run."""
    found = {path.parent: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*/*/config.yaml"))}
    return {f"{run.parent.name}/{run.name}": config for run, config in found.items()}


def test_a_part_runs_alone_and_the_whole_takes_it_over(file: Path) -> None:
    path, out = with_changes(file, "parts"), file.parent / "parts"
    words = ["compare", "--file", str(path)]
    assert main([*words, "--only_arms", "[soft, ce]", "--only_seeds", "[1]"]) == 0
    assert set(configs(out)) == {"ce/seed_1", "soft/seed_1"}
    assert not (out / "compare.json").exists()
    assert configs(out)["ce/seed_1"]["run"]["seed"] == 1
    before = (out / "ce/seed_1/evaluation/accuracy.json").stat().st_mtime_ns
    assert main(words) == 0
    assert len(configs(out)) == 6
    assert (out / "ce/seed_1/evaluation/accuracy.json").stat().st_mtime_ns == before


def test_a_part_that_is_not_of_it_is_refused(file: Path, capsys: pytest.CaptureFixture) -> None:
    for part, message in (("[2]", "only_seeds: no 2; there are 0, 1"), ("1", "only_seeds: expected a list")):
        assert main(["compare", "--file", str(file), "--only_seeds", part]) == 2
        assert message in capsys.readouterr().err


def test_a_seed_may_choose_the_images_as_well(file: Path) -> None:
    data = {"class_path": "visiondistill.data.EmbeddedDigits"}
    pruned = {"class_path": "visiondistill.data.Pruned", "init_args": {"source": data, "fraction": 0.5}}
    pair = yaml.safe_load(file.read_text())["pair"] | {"data": pruned, "steps": 8}
    arms = {"all": {"recipe": "ce", "changes": {"data.fraction": 1.0}}, "half": {"recipe": "ce"}}
    path = with_changes(file, "pruned", pair=pair, arms=arms, reference="all", seeded=["data.prune_seed"])
    assert main(["compare", "--file", str(path)]) == 0
    found = {name: config["data"]["init_args"] for name, config in configs(file.parent / "pruned").items()}
    assert {name: (data["fraction"], data["prune_seed"]) for name, data in found.items()} == {
        **{"all/seed_0": (1.0, 0), "all/seed_1": (1.0, 1)},
        **{"half/seed_0": (0.5, 0), "half/seed_1": (0.5, 1)},
    }


RATE = "optim.student.lr"


def tuned(file: Path, name: str, **tune: object) -> Path:
    """Two arms that may choose between a rate that learns and one that does not."""
    arms = {"ce": {"recipe": "ce"}, "kd": {"recipe": "kd"}}
    settings = {"ce": [{RATE: 1e-9}, {RATE: 0.03}], "kd": [{RATE: 0.03}, {RATE: 1e-9}]}
    tune = {"seed": 7, "trials": 2, "settings": settings} | tune
    return with_changes(file, name, arms=arms, tune=tune)


def test_every_arm_chooses_by_validation_before_its_runs(file: Path, capsys: pytest.CaptureFixture) -> None:
    path, out = tuned(file, "tuned"), file.parent / "tuned"
    words = ["compare", "--file", str(path)]
    assert main([*words, "--only_seeds", "[1]"]) == 2
    assert "ce has unfinished trials: run them first, --only_seeds '[7]'" in capsys.readouterr().err
    assert main([*words, "--only_seeds", "[7]"]) == 0
    assert set(configs(out)) == {f"{arm}/trial_{number}" for arm in ("ce", "kd") for number in (0, 1)}
    # What the test images say is not what is read: the chosen trial does worst on them.
    figures = out / "ce/trial_1/evaluation/accuracy.json"
    figures.write_text(json.dumps(json.loads(figures.read_text()) | {"accuracy": 0.0}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("accuracy.json")}
    assert main(words) == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("accuracy.json")}.items()
    found = {name: (config["run"]["seed"], config["optim"]["student"]["lr"]) for name, config in configs(out).items()}
    assert {name: seed for name, (seed, _) in found.items()} == {
        **{f"{arm}/trial_{number}": 7 for arm in ("ce", "kd") for number in (0, 1)},
        **{f"{arm}/seed_{number}": number for arm in ("ce", "kd") for number in (0, 1)},
    }
    assert {found[f"{arm}/seed_{number}"][1] for arm in ("ce", "kd") for number in (0, 1)} == {0.03}
    ce = json.loads((out / "compare.json").read_text())["arms"][0]["choice"]
    assert ce["setting"] == {RATE: 0.03}
    assert [setting for setting, _ in ce["trials"]] == [{RATE: 1e-9}, {RATE: 0.03}]
    assert ce["trials"][1][1] > ce["trials"][0][1]
    assert "lr 0.03 (of 2)" in (out / "compare.md").read_text()
    # Trials of other settings choose nothing.
    content = yaml.safe_load(path.read_text())
    content["tune"]["settings"]["ce"][1] = {RATE: 0.04}
    path.write_text(yaml.safe_dump(content))
    assert main([*words, "--only_seeds", "[1]", "--only_arms", "[ce]"]) == 2
    assert "ce/trial_1 is finished, with other settings: optim.student.lr was 0.03, is 0.04" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"seed": 1}, "tune.seed: 1 must be a whole number that is none of the compared seeds 0 to 1"),
        ({"trials": 3}, r"tune.settings.ce: expected 3 trials as for every arm"),
        ({"settings": {"ce": [{}, {}], "kd": [{}]}}, r"tune.settings.kd: expected 2 trials"),
        ({"settings": {"ce": [{}, {}]}}, "a list for every arm"),
        ({"settings": [{}, {"optim.student.lrr": 1}]}, r"tune.settings.ce, trial 1: optim.student.lrr"),
        ({"grid": []}, "tune: expected seed, trials and settings"),
        ({"trials": 0, "settings": []}, "tune.trials: expected a whole number >= 1, got 0"),
        ({"settings": [{}, {"steps": 16}]}, "^tune.settings.ce, trial 1: steps is another .* one teacher, student and"),
    ],
)
def test_uneven_or_wrong_trials_are_refused(file: Path, tune: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tuned(file, "uneven", **tune))


def test_trials_need_validation_images(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load(tuned(file, "blind"))
    monkeypatch.setattr("visiondistill.recipes.source_of", lambda config: SimpleNamespace(splits=("train", "test")))
    with pytest.raises(RecipeError, match="these data have none"):
        run(comparison, seeds=[7])


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
        ({"arms": {"a": {"recipe": "kd", "changes": ["x"]}}, "reference": "a", "seeds": 1}, "arms.a.changes: expected"),
        ({"arms": {"a": {"recipe": "kd"}}, "pair": ["x"]}, "^pair: expected a mapping"),
        ({"arms": {"a": {"recipe": "kd"}}, "seeded": "run.seed"}, "^seeded: expected a list"),
        ({"arms": {"..": {"recipe": "kd"}}}, r"'\.\.' cannot name the folder"),
        ({"arms": {"a/b": {"recipe": "kd"}}}, "'a/b' cannot name the folder"),
        ({"arms": {1: {"recipe": "kd"}}}, "1 cannot name the folder"),
    ],
)
def test_wrong_files_are_named(content: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        load(path)


OTHER = {"class_path": NETWORK, "init_args": {"widths": [7, 9]}}


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 16), ("run.batch_size", 16), ("student", OTHER), ("teacher", OTHER)]
)
def test_an_arm_with_other_networks_or_another_budget_is_refused(file: Path, key: str, value: object) -> None:
    arms = {"kd": {"recipe": "kd"}, "more": {"recipe": "kd", "changes": {key: value}}}
    with pytest.raises(RecipeError, match=f"^arms.more: {key} is another than the reference's"):
        load(with_changes(file, "other", arms=arms))


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
