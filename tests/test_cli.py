"""The console command, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visiondistill.cli import main

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--run.log_every", "5", "--run.progress", "false", "--run.proof_window", "2"]
SHORT += ["--stages.teacher.steps", "6", "--stages.student.steps", "6"]


def test_train_runs_a_recipe_and_resumes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["train", "--recipe", "smoke/kd", "--run.output_dir", str(tmp_path / "run"), *SHORT]
    assert main(words) == 0
    assert "finished after step 12" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
    again = ["train", "--recipe", str(tmp_path / "run" / "config.yaml"), "--run.resume", "auto"]
    assert main(again) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], "trian"),
        (["train"], "--recipe"),
        (["train", "--recipe", "nothing"], "nothing"),
        (["train", "--recipe", "smoke/kd", "--run.sede", "1"], "sede"),
        (["demo", "--seed", "1"], "--seed"),
        (["demo", "--seeds", "many"], "--seeds"),
    ],
)
def test_wrong_input_exits_with_2_and_names_it(words: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "demo", "benchmark"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: visiondistill {verb}" in capsys.readouterr().out


def test_module_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "visiondistill", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_accelerate_launches_two_processes(tmp_path: Path) -> None:
    command = [
        # --multi_gpu is how accelerate starts several processes without MPI; without a GPU they meet over gloo.
        *[sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        *["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
        *[
            str(ROOT / "scripts" / "train.py"),
            "--recipe",
            "smoke/kd",
            "--run.output_dir",
            str(tmp_path / "run"),
            *SHORT,
        ],
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    assert done.stdout.count("finished after step 12") == 1
