"""Checkpoints that a disk or a hand has damaged: found, passed over with one loud warning, or named in an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from processes import STEPS, TEACHER_STEPS, Job, Nursery, checkpoints, left_behind

from visiondistill.engine import state

NEWEST = f"step_{STEPS:09d}"
TENSORS = ("weights", "optimizers", "averages", "counters")
FILES = (*(f"{name}.safetensors" for name in TENSORS), "meta.json", "manifest.json")


def truncated(share: float) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: min(int(share * len(content)), len(content) - 1)])

    return act


def flipped(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replaced(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


DAMAGE = {
    "truncated to nothing": truncated(0),
    "truncated to half": truncated(0.5),
    "truncated by a thousandth": truncated(0.999),
    "one bit flipped": flipped,
    "deleted": Path.unlink,
}
GARBLED = {
    "an empty list": replaced("{}"),
    "no list": replaced("null"),
    "binary": lambda path: path.write_bytes(b"\xff"),
}


@pytest.fixture
def run(whole: dict, tmp_path: Path) -> Job:
    """A copy of the finished run: steps 28 and 30, and the end of the first stage."""
    job = Job(str(tmp_path / "run"))
    shutil.copytree(whole["job"].folder, job.folder)
    assert checkpoints(Path(job.folder)) == [f"step_{STEPS - 2:09d}", NEWEST]
    assert {path.name for path in (Path(job.folder) / "checkpoints" / NEWEST).iterdir()} == set(FILES)
    return job


def warned(lines: list[str], file: str) -> bool:
    """One loud warning, which names the file."""
    return len(lines) == 1 and f"{NEWEST}/{file}" in lines[0]


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE)
def test_a_run_goes_on_from_the_previous_checkpoint(
    nursery: Nursery, whole: dict, run: Job, how: Callable[[Path], None]
) -> None:
    how(Path(run.folder) / "checkpoints" / NEWEST / "weights.safetensors")
    code, said = nursery.run(run)
    assert code == 0, said
    assert warned([line for line in said.splitlines() if "Warning: falling back to" in line], "weights.safetensors")
    assert left_behind(Path(run.folder)) == {name: whole[name] for name in ("files", "numbers", "curve")}
    assert checkpoints(Path(run.folder)) == [f"step_{STEPS - 2:09d}", NEWEST]


@pytest.mark.parametrize("how", (DAMAGE | GARBLED).values(), ids=DAMAGE | GARBLED)
@pytest.mark.parametrize("file", FILES)
def test_damage_of_any_file_is_found(run: Job, file: str, how: Callable[[Path], None]) -> None:
    parent = Path(run.folder) / "checkpoints"
    how(parent / NEWEST / file)
    with pytest.warns(UserWarning, match="falling back to an earlier checkpoint") as caught:
        assert state.newest(parent) == parent / f"step_{STEPS - 2:09d}"
    lines = [str(warning.message) for warning in caught]
    assert warned(lines, file) or (len(lines) == 1 and file == state.MANIFEST and NEWEST in lines[0])


def test_no_whole_checkpoint_is_an_error(nursery: Nursery, run: Job) -> None:
    for name in checkpoints(Path(run.folder)):
        flipped(Path(run.folder) / "checkpoints" / name / "averages.safetensors")
    code, said = nursery.run(run)
    assert code == 2
    assert "no checkpoint below" in said
    assert said.count("averages.safetensors is damaged") == 2


def test_the_damaged_end_of_an_earlier_stage_is_an_error(nursery: Nursery, run: Job) -> None:
    """Nothing else holds what the second stage was handed."""
    flipped(Path(run.folder) / "checkpoints" / "stage_0_teacher" / "weights.safetensors")
    code, said = nursery.run(run)
    assert code == 2
    assert "stage_0_teacher/weights.safetensors" in said


def test_a_named_checkpoint_that_is_damaged_is_an_error(nursery: Nursery, run: Job, tmp_path: Path) -> None:
    """Who names one wants that one: no other takes its place."""
    named = Path(run.folder) / "checkpoints" / NEWEST
    flipped(named / "weights.safetensors")
    code, said = nursery.run(Job(str(tmp_path / "new"), {"resume": str(named)}))
    assert code == 2
    assert f"{named}/weights.safetensors is damaged" in said
    assert not (tmp_path / "new").exists()


def test_the_run_goes_on_after_a_fall_back_over_a_stage_s_end(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """The first stage ends a second time, over what its first end left behind."""
    job = Job(str(tmp_path / "run"), {"keep": 20})
    assert nursery.run(job)[0] == 0
    for name in checkpoints(Path(job.folder)):
        if int(name.removeprefix("step_")) >= TEACHER_STEPS:
            flipped(Path(job.folder) / "checkpoints" / name / "weights.safetensors")
    code, said = nursery.run(replace(job, settings={}))
    assert code == 0, said
    assert left_behind(Path(job.folder))["files"] == whole["files"]
