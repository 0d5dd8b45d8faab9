"""A disk that is full or may not be written to: nothing that was saved is lost, and with room the run goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import STEPS, Act, Job, Nursery, checkpoints, left_behind

from visiondistill.engine import state

FULL = "No space left on device"
REFUSED = 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MiB of its own."""
    with mounted(tmp_path / "disk", "size=1m") as folder:
        yield folder


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(job: Job, code: int, said: str, kept: list[str]) -> None:
    """The message names folder, bytes and cure; what was saved before is whole, and nothing else has a name."""
    assert code == REFUSED, said
    lines = [line for line in said.splitlines() if line.startswith("visiondistill train: ")]
    assert len(lines) == 1
    assert f"{job.folder}/checkpoints/" in lines[0]
    assert "bytes" in lines[0]
    assert "make room" in lines[0].lower()
    assert "run.resume=auto" in lines[0]
    assert "Traceback" not in said
    assert sorted(path.name for path in (Path(job.folder) / "checkpoints").iterdir()) == kept
    for name in kept:
        state.load(Path(job.folder) / "checkpoints" / name)


@pytest.mark.parametrize("log_every", [1, 100], ids=["metrics fail first", "the checkpoint fails first"])
def test_a_full_disk(nursery: Nursery, whole: dict, small_disk: Path, log_every: int) -> None:
    """It fills up after step 9; the next checkpoint is due at 10, the end of the first stage."""
    ballast = small_disk / "ballast"
    job = Job(str(small_disk / "run"), {"log_every": log_every}, beside=str(small_disk.parent / "beside"))
    code, said = nursery.run(replace(job, acts=(Act("stepped", 9, f"fill {ballast}"),)))
    refused(job, code, said, ["step_000000004", "step_000000008"])
    assert FULL in said
    ballast.unlink()
    code, said = nursery.run(job)
    assert code == 0, said
    assert left_behind(Path(job.folder))["files"] == whole["files"]


def test_a_limit_on_file_size(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """As a quota refuses: in the middle of a file. Needs no mount."""
    job = Job(str(tmp_path / "run"))
    code, said = nursery.run(replace(job, acts=(Act("stepped", 13, "limit 4000"),)))
    refused(job, code, said, ["stage_0_teacher", "step_000000010", "step_000000012"])
    assert os.strerror(errno.EFBIG) in said
    assert nursery.run(job)[0] == 0
    assert left_behind(Path(job.folder))["files"] == whole["files"]


PHASES: dict[str, tuple[object, str, int]] = {
    "folder": (Path, "mkdir", 2),
    "tensors": (state, "save_file", 1),
    "more tensors": (state, "save_file", 2),
    "meta": (Path, "write_text", 1),
    "sums": (state, "sha256_of", 2),
    "manifest": (Path, "write_text", 2),
    "flush of a file": (state, "_flush", 1),
    "flush of the folder": (state, "_flush", 5),
    "name": (state.os, "replace", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    contents = {"weights": {"w": torch.ones(2)}, "averages": {"w": torch.zeros(2)}}
    state.save(tmp_path / "step_1", contents, {"step": 1})
    where, name, nth = PHASES[phase]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing(getattr(where, name), nth))
        with pytest.raises(OSError, match=FULL):
            state.save(tmp_path / "step_2", contents, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert state.load(tmp_path / "step_1")[1] == {"step": 1}
    state.save(tmp_path / "step_2", contents, {"step": 2})
    assert state.newest(tmp_path) == tmp_path / "step_2"


def failing(function: Callable, nth: int) -> Callable:
    calls = []

    def wrapped(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, FULL)
        return function(*arguments, **options)

    return wrapped


def test_a_folder_that_cannot_be_written_to(nursery: Nursery, tmp_path: Path) -> None:
    """Said before step 1; a file where a folder should be refuses root, too."""
    (tmp_path / "file").write_text("")
    unwritable(nursery, Job(str(tmp_path / "file" / "run"), beside=str(tmp_path / "beside")))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_read_only_disk(nursery: Nursery, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as folder:
        unwritable(nursery, Job(f"{folder}/run", beside=str(tmp_path / "beside")))


def unwritable(nursery: Nursery, job: Job) -> None:
    code, said = nursery.run(replace(job, acts=(Act("step", 1, "raise"),)))
    assert code == 2, said
    assert f"run.output_dir: {job.folder} cannot be written to" in said


def test_a_run_of_another_disk_goes_on_on_this_one(
    nursery: Nursery, whole: dict, small_disk: Path, tmp_path: Path
) -> None:
    """The cure where no room can be made: continue elsewhere, from the folder that is full."""
    job = Job(str(small_disk / "run"), beside=str(tmp_path / "beside"))
    nursery.run(replace(job, acts=(Act("stepped", 17, f"fill {small_disk}/ballast"),)))
    assert checkpoints(Path(job.folder))[-1] == "step_000000016"
    elsewhere = Job(str(tmp_path / "run"), {"resume": job.folder})
    assert nursery.run(elsewhere)[0] == 0
    assert left_behind(Path(elsewhere.folder), STEPS)["files"] == whole["files"]
