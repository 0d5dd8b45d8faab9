"""What a run may be continued from, and what it must refuse while leaving every file as it was."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from processes import STUDENT_STEPS, TEACHER_STEPS, Act, Job, Nursery, left_behind

SHORT = ["--run.log_every", "4", "--run.progress", "false", "--run.proof_window", "2", "--run.device", "cpu"]
SHORT += ["--run.checkpoint_every", "4", "--stages.teacher.steps", "6", "--stages.student.steps", "6"]


def command(folder: Path, *words: str) -> Job:
    beside = str(folder.parent / f"{folder.name}-process")
    given = ("train", "--recipe", "smoke/kd", *SHORT, "--run.output_dir", str(folder), *words)
    return Job(str(folder), kind="command", words=given, beside=beside)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    code, said = nursery.run(command(folder))
    assert code == 0, said
    return folder


@pytest.fixture
def earlier(finished: Path, tmp_path: Path) -> Path:
    """A run folder of one's own; its last metric line is beyond its last checkpoint, as a kill leaves it."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000012")
    return tmp_path / "run"


def refused(nursery: Nursery, job: Job, *named: str) -> None:
    """Exit code 2, `named` in one message, no traceback."""
    code, said = nursery.run(job)
    assert code == 2, said
    assert "visiondistill train: " in said
    assert "Traceback" not in said
    for name in named:
        assert name in said


@pytest.mark.parametrize("option", ["--run.resume", "--run.init_from"])
@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_named_run_that_is_not_there(nursery: Nursery, option: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(nursery, command(tmp_path / "new", option, str(tmp_path / name)), str(tmp_path / name))
    assert not (tmp_path / "new").exists()
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        pytest.param(
            ("--run.seed", "1", "--run.batch_size", "16", "--stages.teacher.optim.student.lr", "0.5"),
            ("run.seed: was 0, is 1", "run.batch_size: was 32, is 16", "stage.optim.student.lr: was 0.01, is 0.5"),
            id="several settings",
        ),
        pytest.param(("--stages.student.steps", "7"), ("stage.steps: was 6, is 7",), id="the later stage's length"),
        pytest.param(
            ("--stages.student.method.weighting.weights", "{ce: 0.2, kd: 0.8}"),
            ("weights.ce: was 0.1, is 0.2", "weights.kd: was 0.9, is 0.8"),
            id="the weights of the terms",
        ),
        pytest.param(
            ("--stages.teacher.method.student.widths", "[16, 32, 48]"),
            ("stage.shapes.players.student.", "was [10, 64], is [10, 48]"),
            id="another network",
        ),
        pytest.param(
            ("--stages.teacher.method.student.norm", "group"),
            ("running_mean: was [16], is None",),
            id="a network with other tensors",
        ),
    ],
)
def test_another_config(nursery: Nursery, earlier: Path, words: tuple[str, ...], named: tuple[str, ...]) -> None:
    before = contents(earlier)
    refused(nursery, command(earlier, "--run.resume", "auto", *words), *named)
    assert contents(earlier) == before


def test_another_config_in_another_folder(nursery: Nursery, earlier: Path, tmp_path: Path) -> None:
    """What differs is found in the second stage, when the first one has been restored."""
    before = contents(earlier)
    words = ("--run.resume", str(earlier), "--stages.student.steps", "7")
    refused(nursery, command(tmp_path / "new", *words), "stage.steps: was 6, is 7")
    assert contents(earlier) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("[16, 32, 48]", "batch"), ("misshaped 'players.student.", "head.weight: [10, 64] for [10, 48]")),
        (("[16, 32]", "batch"), ("unexpected 'players.student.",)),
        (("[16, 32, 64]", "none"), ("missing", "unexpected 'players.student.")),
    ],
)
def test_weights_of_another_network(
    nursery: Nursery, finished: Path, words: tuple[str, str], named: tuple[str, ...], tmp_path: Path
) -> None:
    """`init_from` compares keys and shapes strictly. The weights of the first stage have the first stage's keys."""
    before = contents(finished)
    options = ["--run.init_from", str(finished / "checkpoints" / "stage_0_teacher")]
    options += ["--stages.teacher.method.student.widths", words[0], "--stages.teacher.method.student.norm", words[1]]
    refused(nursery, command(tmp_path / "new", *options), *named)
    assert contents(finished) == before
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use(nursery: Nursery, earlier: Path) -> None:
    before = contents(earlier)
    refused(nursery, command(earlier, "--run.seed", "5"), f"{earlier} already holds a run")
    assert contents(earlier) == before


def test_the_saved_recipe_goes_on(nursery: Nursery, finished: Path, earlier: Path) -> None:
    """As the help says: `train --recipe <run>/config.yaml --run.resume auto`."""
    words = (
        "train",
        "--recipe",
        str(earlier / "config.yaml"),
        "--run.output_dir",
        str(earlier),
        "--run.resume",
        "auto",
    )
    code, said = nursery.run(replace(command(earlier), words=words))
    assert code == 0, said
    found, expected = left_behind(earlier, 12), left_behind(finished, 12)
    assert found["files"] == expected["files"]
    assert [line["step"] for line in found["curve"]] == [line["step"] for line in expected["curve"]]


@pytest.mark.parametrize("step", [TEACHER_STEPS, TEACHER_STEPS + 3], ids=["at the end of a stage", "in the next stage"])
def test_a_run_goes_on_in_another_folder_and_there_again(
    nursery: Nursery, whole: dict, step: int, tmp_path: Path
) -> None:
    """What earlier stages made must be found there when that folder is continued."""
    first, second = Job(str(tmp_path / "first")), Job(str(tmp_path / "second"), {"resume": str(tmp_path / "first")})
    nursery.run(replace(first, acts=(Act("step", step, "SIGTERM"),)))
    nursery.run(replace(second, acts=(Act("stepped", STUDENT_STEPS - 6, "SIGKILL"),)))
    shutil.rmtree(first.folder)
    code, said = nursery.run(replace(second, settings={}))
    assert code == 0, said
    found = left_behind(Path(second.folder))
    assert found["files"] == whole["files"]
    assert found["numbers"] == whole["numbers"]


def test_the_same_seed_twice_and_another(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """In two processes each."""
    again, other = Job(str(tmp_path / "again")), Job(str(tmp_path / "other"), {"seed": 1})
    assert [nursery.run(job)[0] for job in (again, other)] == [0, 0]
    assert left_behind(tmp_path / "again") == {name: whole[name] for name in ("files", "numbers", "curve")}
    found = left_behind(tmp_path / "other")
    # How many updates there were depends on no seed.
    drawn = set(whole["files"]) - {"counters.safetensors"}
    assert len(drawn) >= 3
    assert all(found["files"][name] != whole["files"][name] for name in drawn)
