"""A killed run, resumed, is the uninterrupted one: whenever the kill came, however often, whatever it hit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from processes import EPOCH, PATIENCE, STEPS, TEACHER_STEPS, Act, Job, Nursery, checkpoints, left_behind, phases

from visiondistill.engine import state
from visiondistill.engine.errors import ResumeError

KILLED = 128 + signal.SIGKILL
SECOND_STAGE = TEACHER_STEPS + 1


def same(found: dict, whole: dict) -> bool:
    return all(found[name] == whole[name] for name in ("files", "numbers", "curve"))


def tidy(job: Job) -> bool:
    """Nothing but named, whole checkpoints, no more of them than asked for."""
    for folder in (Path(job.folder) / "checkpoints").iterdir():
        state.verify(folder)
    return len(checkpoints(Path(job.folder))) == 2


def finish(nursery: Nursery, job: Job, whole: dict) -> None:
    code, said = nursery.run(job)
    assert code == 0, said
    assert same(left_behind(Path(job.folder)), whole)
    assert tidy(job)


class Watcher(threading.Thread):
    """Looks at the checkpoints all the time: each that has a name must be whole, and there must always be one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.found, self.looks = folder, [], 0
        self._ended = threading.Event()

    def run(self) -> None:
        begun = False
        while not self._ended.wait(0.005):
            names = checkpoints(self.folder)
            begun = begun or bool(names)
            if not begun:
                continue
            self.looks += 1
            if not names:
                self.found.append("no checkpoint")
                continue
            try:
                state.verify(self.folder / "checkpoints" / names[-1])
            except (ResumeError, OSError) as error:
                # It may have been superseded while it was read.
                if names[-1] in checkpoints(self.folder):
                    self.found.append(str(error))

    def end(self) -> None:
        self._ended.set()
        self.join()


def random_act(chance: random.Random, whole: dict) -> Act:
    """A kill in any phase of any save."""
    saves = [phase for phase in phases(whole["job"]) if phase[0].startswith("save.")]
    return Act(*chance.choice(saves), "SIGKILL")


def kill_once(nursery: Nursery, job: Job, chance: random.Random, whole: dict, in_save: bool) -> int:
    if in_save:
        return nursery.run(replace(job, acts=(random_act(chance, whole),)))[0]
    child = nursery.start(job)
    time.sleep(chance.uniform(0, 1.1 * whole["seconds"]))
    child.signal(signal.SIGKILL)
    return child.wait()


@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 20))])
def test_a_kill_at_a_random_time(nursery: Nursery, whole: dict, number: int, tmp_path: Path) -> None:
    """Odd numbers in a save, even ones anywhere in the life of the process; half of the resumed runs are killed too."""
    chance, job = random.Random(number), Job(str(tmp_path / "run"))
    watcher = Watcher(Path(job.folder))
    watcher.start()
    code = kill_once(nursery, job, chance, whole, in_save=number % 2 == 1)
    assert code == KILLED or number % 2 == 0
    if number % 4 >= 2:
        kill_once(nursery, job, chance, whole, in_save=chance.random() < 0.5)
    finish(nursery, job, whole)
    watcher.end()
    assert watcher.looks
    assert not watcher.found


@pytest.mark.slow
def test_a_kill_in_every_phase_of_a_stage_s_last_save(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """The one save that writes two folders; after each kill the run is killed once more, a stage later."""
    events = phases(whole["job"])
    third = [place for place, (phase, _) in enumerate(events) if phase == "save.over"][1:3]
    last_save = [event for event in events[third[0] + 1 : third[1] + 1] if event[0].startswith("save.")]
    assert len(last_save) > 25
    for place, event in enumerate(last_save):
        job = Job(str(tmp_path / str(place)))
        assert nursery.run(replace(job, acts=(Act(*event, "SIGKILL"),)))[0] == KILLED
        nursery.run(replace(job, acts=(Act("stepped", STEPS - TEACHER_STEPS - 3, "SIGKILL"),)))
        finish(nursery, job, whole)


def test_a_kill_between_the_last_save_and_its_clean_up(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """Nothing is left to train or to save, and still nothing superfluous stays."""
    job = Job(str(tmp_path / "run"))
    last = [event for event in phases(whole["job"]) if event[0] == "save.end"][-1]
    assert nursery.run(replace(job, acts=(Act(*last, "SIGKILL"),)))[0] == KILLED
    assert len(checkpoints(Path(job.folder))) == 3
    finish(nursery, job, whole)


def test_a_kill_between_the_two_folders_of_a_stage_s_last_save(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    """Then in the second stage, from which the first one's end is needed."""
    job = Job(str(tmp_path / "run"))
    events = phases(whole["job"])
    between = next(a for a, b in pairwise(events) if (a[0], b[0]) == ("save.end", "save.begin"))
    assert nursery.run(replace(job, acts=(Act(*between, "SIGKILL"),)))[0] == KILLED
    late = Act("stepped", STEPS - TEACHER_STEPS - 3, "SIGKILL")
    assert nursery.run(replace(job, acts=(late,)))[0] == KILLED
    assert checkpoints(Path(job.folder))[-1] > f"step_{SECOND_STAGE:09d}"
    finish(nursery, job, whole)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(EPOCH + 2, id="second epoch"),
        pytest.param(SECOND_STAGE + 1, id="second stage, mid-cycle"),
        pytest.param(SECOND_STAGE + EPOCH + 1, id="second stage, second epoch, mid-cycle"),
    ],
)
def test_a_kill_at_a_step(nursery: Nursery, whole: dict, step: int, tmp_path: Path) -> None:
    """A checkpoint of every step, so that the run goes on exactly there; other initial weights where none is needed."""
    job = Job(str(tmp_path / "run"), {"checkpoint_every": 1})
    assert nursery.run(replace(job, acts=(Act("stepped", step, "SIGKILL"),)))[0] == KILLED
    assert checkpoints(Path(job.folder))[-1] == f"step_{step - 1:09d}"
    # A player of a stage that has not begun is in no checkpoint: it is the constructor's.
    finish(nursery, replace(job, weights=7 if step > SECOND_STAGE else 0), whole)


def test_three_kills_in_one_epoch_with_other_workers_each_time(nursery: Nursery, whole: dict, tmp_path: Path) -> None:
    job = Job(str(tmp_path / "run"), {"checkpoint_every": 1})
    kills = [(2, SECOND_STAGE + 1), (0, 2), (1, 2)]
    for workers, step in kills:
        child = nursery.start(replace(job, workers=workers, acts=(Act("stepped", step, "SIGKILL"),)))
        assert child.wait() == KILLED
        assert alone(child.pid)
    assert checkpoints(Path(job.folder))[-1] == f"step_{SECOND_STAGE + 2:09d}"
    finish(nursery, job, whole)


def alone(session: int, seconds: float = PATIENCE) -> bool:
    """Whether all that a killed process had started is gone, or goes in this time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(in_session(process, session) for process in psutil.process_iter()):
            return True
        time.sleep(0.2)
    return False


def in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
