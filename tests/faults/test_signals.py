"""SIGTERM and Ctrl-C at every stage of a run's life: the step is kept, the exit code says so, the run goes on later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import EPOCH, PATIENCE, STEPS, TEACHER_STEPS, Act, Job, Nursery, checkpoints, left_behind

ROOT = Path(__file__).resolve().parents[2]
TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


def kept(job: Job) -> int:
    """The step of the newest checkpoint."""
    return int(checkpoints(Path(job.folder))[-1].removeprefix("step_"))


@pytest.mark.parametrize(
    ("act", "settings", "step"),
    [
        pytest.param(Act("built", 1, "SIGTERM"), {}, 1, id="while networks are built"),
        pytest.param(Act("step", 7, "SIGTERM"), {}, 7, id="train step"),
        pytest.param(Act("step", TEACHER_STEPS, "SIGTERM"), {}, TEACHER_STEPS, id="last step of a stage"),
        pytest.param(Act("step", 17, "SIGINT"), {}, 17, id="train step of the second stage, by ctrl-c"),
        pytest.param(Act("save.replace", 2, "SIGTERM"), {}, 9, id="save"),
        pytest.param(Act("look", 2, "SIGTERM"), {"evaluate_every": 3}, 6, id="look at validation images"),
    ],
)
def test_the_interrupted_step_is_kept(
    nursery: Nursery, whole: dict, act: Act, settings: dict, step: int, tmp_path: Path
) -> None:
    job = Job(str(tmp_path / "run"), settings)
    code, said = nursery.run(replace(job, acts=(act,)))
    assert code == (INTERRUPTED if act.do == "SIGINT" else TERMINATED), said
    assert f"{act.do} after step {step}" in said
    assert kept(job) == step
    assert nursery.run(job)[0] == 0
    assert left_behind(Path(job.folder)) == {name: whole[name] for name in ("files", "numbers", "curve")}


def compiled(nursery: Nursery, backend: str, do: str, folder: Path) -> None:
    """A signal in the first compilation; the run goes on as the uninterrupted compiled one."""
    settings = {"compile": True, "compile_backend": backend}
    job = Job(str(folder / "run"), settings)
    code, said = nursery.run(replace(job, acts=(Act("compile", 1, do),)))
    assert (code, kept(job)) == (TERMINATED, 1), said
    assert nursery.run(job)[0] == 0
    assert nursery.run(alone := Job(str(folder / "whole"), settings))[0] == 0
    assert left_behind(Path(job.folder)) == left_behind(Path(alone.folder))


def test_in_the_first_compilation(nursery: Nursery, tmp_path: Path) -> None:
    compiled(nursery, "announced", "SIGTERM", tmp_path)


@pytest.mark.slow
def test_in_the_first_compilation_by_inductor(nursery: Nursery, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    compiled(nursery, "announced_inductor", "soon SIGTERM", tmp_path)


def test_when_all_steps_are_done_but_not_all_is_saved(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """Who asks for the end is not kept waiting for an evaluation; the run is whole all the same."""
    job = Job(str(tmp_path / "run"))
    code, said = nursery.run(replace(job, acts=(Act("step", STEPS, "SIGTERM"),)))
    assert (code, kept(job)) == (TERMINATED, STEPS), said
    code, said = nursery.run(job)
    assert code == 0
    assert f"finished after step {STEPS}" in said
    assert left_behind(Path(job.folder))["files"] == whole["files"]


def test_a_second_ctrl_c_interrupts_at_once(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    job = Job(str(tmp_path / "run"))
    code, said = nursery.run(replace(job, acts=(Act("step", 7, "twice SIGINT"),)))
    assert code == INTERRUPTED
    assert "KeyboardInterrupt" in said
    assert kept(job) == 4
    assert nursery.run(job)[0] == 0
    assert left_behind(Path(job.folder))["files"] == whole["files"]


def test_a_second_ctrl_c_in_a_save_leaves_nothing_half_written(nursery: Nursery, tmp_path: Path) -> None:
    job = Job(str(tmp_path / "run"))
    assert nursery.run(replace(job, acts=(Act("save.replace", 2, "twice SIGINT"),)))[0] == INTERRUPTED
    assert [path.name for path in (Path(job.folder) / "checkpoints").iterdir()] == checkpoints(Path(job.folder))


def test_a_signal_to_the_whole_group_leaves_the_workers_alone(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """As a terminal's Ctrl-C and a scheduler's SIGTERM come. More steps follow than were loaded ahead."""
    job = Job(str(tmp_path / "run"), workers=1)
    acts = (Act("step", 2, "group SIGTERM"), Act("step", 2 + EPOCH, "SIGTERM"))
    code, said = nursery.run(replace(job, kind="deaf", acts=acts))
    assert code == TERMINATED, said
    assert kept(job) == 2 + EPOCH
    assert nursery.run(replace(job, workers=0))[0] == 0
    assert left_behind(Path(job.folder))["files"] == whole["files"]


WORDS = ["train", "--recipe", "kd", "--data.class_path", "visiondistill.data.EmbeddedDigits"]
WORDS += ["--student.class_path", "visiondistill.models.SmallConvNet", "--student.widths", "[8]"]
WORDS += ["--teacher.class_path", "processes.NearestMean", "--optim.student.lr", "0.01", "--steps", "24"]
WORDS += ["--run.device", "cpu", "--run.batch_size", "16", "--run.log_every", "4", "--run.evaluate_every", "8"]
WORDS += ["--run.progress", "false", "--run.ema_decay", "0.9", "--run.resume", "auto", "--run.proof_window", "2"]


def asked(folder: Path, *acts: Act) -> Job:
    return Job(str(folder), kind="command", words=(*WORDS, "--run.output_dir", str(folder)), acts=acts)


def made(folder: Path) -> dict[str, object]:
    """What a run is for: its evaluation and the exported weights."""
    report = json.loads((folder / "evaluation" / "accuracy.json").read_text())
    weights = (folder / "export" / "model.safetensors").read_bytes()
    return {"accuracy": report["accuracy"], "nll": report["nll"], "weights": hashlib.sha256(weights).hexdigest()}


@pytest.fixture(scope="module")
def command(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("command") / "run"
    code, said = nursery.run(asked(folder))
    assert code == 0, said
    return made(folder)


def test_in_the_preflight(nursery: Nursery, tmp_path: Path) -> None:
    """There is nothing to keep yet: the signal ends the process itself, and nothing was written."""
    code, said = nursery.run(asked(tmp_path / "run", Act("preflight", 1, "SIGTERM")))
    assert code == TERMINATED, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("phase", "nth", "step"), [("step", 9, 9), ("evaluation", 1, 24), ("export", 2, 24)])
def test_the_command_goes_on_and_does_what_was_left(
    nursery: Nursery, command: dict[str, object], phase: str, nth: int, step: int, tmp_path: Path
) -> None:
    """After training there is nothing to lose, and the signal ends the process itself."""
    folder = tmp_path / "run"
    code, said = nursery.run(asked(folder, Act(phase, nth, "SIGTERM")))
    assert code == TERMINATED, said
    assert kept(asked(folder)) == step
    assert not (folder / "export").exists()
    code, said = nursery.run(asked(folder))
    assert code == 0, said
    assert made(folder) == command
    assert {path.name for path in folder.iterdir() if path.name[0] == "."} == set()


@pytest.mark.slow
def test_an_export_killed_while_it_replaces_an_earlier_one(
    nursery: Nursery, command: dict[str, object], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert nursery.run(asked(folder))[0] == 0
    assert nursery.run(asked(folder, Act("export.half deleted", 1, "SIGKILL")))[0] == 128 + signal.SIGKILL
    code, said = nursery.run(asked(folder))
    assert code == 0, said
    assert made(folder) == command


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """No hook, no fork: the command as a scheduler runs and ends it."""
    folder = tmp_path / "run"
    words = ["train", "--recipe", "smoke/kd", "--run.output_dir", str(folder), "--stages.teacher.steps", "100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(
        [sys.executable, "-m", "visiondistill", *words, "--run.log_every", "5"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
    assert child.returncode == TERMINATED, said
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert checkpoints(folder) == [f"step_{step:09d}"]
