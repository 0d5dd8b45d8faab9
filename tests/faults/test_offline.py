"""No network, and a cache that cannot be written: what is missing is named at once, what is there is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from visiondistill.engine.state import sha256_of

STARTS = 60.0
"""Seconds that the interpreter, torch and timm may take on a machine that is busy, with 20 s to fail in."""
TINY = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for index in range(10):
            level = 60 if name == "cat" else 190
            pixels = generator.integers(level - 50, level + 50, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody may write below `folder`; that root did not, whom no mode stops, is seen by what lies there."""
    paths, before = (*folder.rglob("*"), folder), everything(folder)
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert everything(folder) == before


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def command(words: list[str], folder: Path, **environment: str) -> tuple[int, str, float]:
    """Exit code, output and seconds of a fresh process without any proxy, whose home is `folder`."""
    cleared = ("proxy", "hf_", "hugging", "xdg_", "torch_home")
    inherited = {name: value for name, value in os.environ.items() if not any(c in name.lower() for c in cleared)}
    own = {"HOME": str(folder), "TORCH_HOME": str(folder / "torch"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "visiondistill", *words],
        env=inherited | own | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


SMALL = ["--student.class_path", "visiondistill.models.SmallConvNet", "--student.in_channels", "3"]


def words(photos: Path, run: Path, recipe: list[str]) -> list[str]:
    own = ["--run.output_dir", str(run), "--run.device", "cpu", "--run.batch_size", "4", "--run.proof_window", "0"]
    return ["train", "--recipe", *recipe, "--data.root", str(photos), *own]


WAYS = {
    "told so": {"HF_HUB_OFFLINE": "1"},
    # A port on which nobody listens, as behind a firewall that says no.
    "no answer": {"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
}


@pytest.mark.parametrize("way", ["no answer", pytest.param("told so", marks=pytest.mark.slow)])
def test_weights_that_are_not_there_fail_at_once_with_file_and_place(way: str, photos: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    given = words(photos, run, ["kd", "--teacher.name", "resnet18.a1_in1k", *SMALL])
    with locked(cache):
        code, said, seconds = command(given, tmp_path, HF_HOME=str(cache), **WAYS[way])
    assert code == 2, said
    assert "Traceback" not in said
    for part in ("teacher", "timm/resnet18.a1_in1k/model.safetensors", "give it as weights: FILE"):
        assert part in said, said
    assert not run.exists()
    assert seconds < STARTS


def test_weights_that_are_there_are_used_where_nothing_can_be_written(photos: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "hub" / f"models--timm--{TINY}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    torch.manual_seed(0)
    save_file(timm.create_model(TINY).state_dict(), snapshot / "model.safetensors")
    run = tmp_path / "run"
    given = words(photos, run, ["finetune", "--student.name", TINY, "--steps", "3"])
    with locked(cache):
        code, said, _ = command(given, tmp_path, HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert code == 0, said
    student = json.loads((run / "preflight.json").read_text())["student"]
    assert student["sha256"] == sha256_of(snapshot / "model.safetensors")
    assert str(snapshot) in student["weights"]
