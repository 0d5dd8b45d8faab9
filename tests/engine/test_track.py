"""metrics.jsonl, the progress on a terminal, in a file and in a notebook, and what may go wrong with them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, assert_continues, assert_same, play, spawn

import visiondistill
from visiondistill.engine import track
from visiondistill.engine.launch import World
from visiondistill.engine.track import Tracker

CPU = World(torch.device("cpu"))


def tracker(folder: Path, done: int = 0, total: int = 100, progress: bool = False, rows: int = 8) -> Tracker:
    return Tracker(folder, CPU, total, done, rows, progress)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in lines_of(folder)]


def log(to: Tracker, *steps: int) -> None:
    for step in steps:
        to.log(step, "main", {"fit": step / 2})


class Disk:
    """Stands for the file of metrics.jsonl; has room for `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    """Files of metrics.jsonl that are opened in this test, each with room for two and a half lines."""
    opened: list[Disk] = []
    genuine = Path.open

    def limited(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = genuine(path, mode, *arguments, **options)
        if path.name != "metrics.jsonl" or "a" not in mode:
            return file
        opened.append(Disk(file, 250))
        return opened[-1]

    monkeypatch.setattr(Path, "open", limited)
    return opened


def test_a_line_is_in_the_file_when_it_was_logged(tmp_path: Path) -> None:
    with tracker(tmp_path) as to:
        log(to, 1)
        assert steps_of(tmp_path) == [1]
        log(to, 2)
        assert lines_of(tmp_path) == to.history


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from visiondistill.engine.launch import World
from visiondistill.engine.track import Tracker

with Tracker(Path(sys.argv[1]), World(torch.device("cpu")), 10, 0, 8, False) as tracker:
    for step in range(1, 8):
        tracker.log(step, "main", {"fit": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_line_is_lost_to_a_kill(tmp_path: Path) -> None:
    place = str(Path(visiondistill.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": place})
    assert done.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == list(range(1, 8))


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 5, "sta',
        b'{"step": 5}',
        b'{"step": 5, "stage": "main"\n',
        b"\0\0\0\0\0\0",
        b'\0\0\0{"step": 5}\n',
        b"\xff\xfe\n",
        b"[5]\n",
        b"5\n",
        b"{}\n",
        b'{"step": "5"}\n',
    ],
)
def test_a_torn_last_line_is_dropped_when_a_run_goes_on(torn: bytes, tmp_path: Path) -> None:
    with tracker(tmp_path) as to:
        log(to, 1, 2, 3, 4)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with tracker(tmp_path, done=6) as to:
        assert [line["step"] for line in to.history] == [1, 2, 3, 4]
        log(to, 7)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 7]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    with tracker(tmp_path) as to:
        log(to, 1, 2, 3, 4)
    with tracker(tmp_path, done=2) as to:
        log(to, 3)
    assert steps_of(tmp_path) == [1, 2, 3]
    with tracker(tmp_path, done=0):
        assert steps_of(tmp_path) == []


def test_a_resumed_run_with_a_torn_line_has_every_line_once(tmp_path: Path) -> None:
    whole = play(Job("whole", "offset"), tmp_path)
    play(Job("cut", "offset", signal_at=9), tmp_path)
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "stage": "ma')
    resumed = play(Job("cut", "offset", weights=7, settings={"resume": "auto"}), tmp_path)
    assert_continues(whole, resumed, 10)
    assert steps_of(tmp_path / "cut") == list(range(1, 21))
    assert lines_of(tmp_path / "cut") == resumed.history


def test_a_full_disk_costs_a_warning_and_later_no_line(tmp_path: Path, disks: list[Disk]) -> None:
    with tracker(tmp_path) as to:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log(to, *range(1, 7))
        (warning,) = caught
        assert "metrics.jsonl could not be written" in str(warning.message)
        assert "No space left on device" in str(warning.message)
        assert (tmp_path / "metrics.jsonl").stat().st_size == 250
        disks[0].room = 10**6
        log(to, 7)
        assert lines_of(tmp_path) == to.history
        assert steps_of(tmp_path) == list(range(1, 8))


def test_lines_that_wait_for_room_are_tried_at_the_end(tmp_path: Path, disks: list[Disk]) -> None:
    with tracker(tmp_path) as to:
        with pytest.warns(UserWarning, match="could not be written"):
            log(to, *range(1, 7))
        disks[0].room = 10**6
    assert steps_of(tmp_path) == list(range(1, 7))


def test_a_full_disk_for_the_metrics_does_not_change_the_run(tmp_path: Path, disks: list[Disk]) -> None:
    with pytest.warns(UserWarning, match="could not be written"):
        full = play(Job("full", "offset"), tmp_path)
    (disk,) = disks
    disk.room = 0
    assert full.reason == "finished"
    assert [line["step"] for line in full.history] == list(range(1, 21))
    assert (tmp_path / "full" / "checkpoints" / "step_000000020").is_dir()
    # What reached the disk is whole lines and one torn; the next run of this folder drops that one.
    with tracker(tmp_path / "full", done=20) as to:
        assert to.history == full.history[: len(to.history)]
        assert len(to.history) >= 1


def test_a_full_disk_keeps_the_lines_of_a_resumed_run(tmp_path: Path, disks: list[Disk]) -> None:
    """They are not written anew: for that there would be no room."""
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 100)))
    with tracker(tmp_path, done=50) as to:
        disks[0].room = 0
        with pytest.warns(UserWarning, match="could not be written"):
            log(to, 51)
    assert steps_of(tmp_path) == list(range(1, 51))


def test_losses_are_in_the_order_of_their_turns_whichever_began_the_window(tmp_path: Path) -> None:
    """The student's turn is every fifth: windows of 7 steps begin with it, and 2, 4, 1 and 3 steps after it."""
    history = play(Job("windows", "dmd2", steps=35, settings={"log_every": 7}), tmp_path).history
    first, *others = ([name for name in line if "/" in name] for line in history)
    assert [name.partition("/")[0] for name in first[:5]] == ["student", "student", "critic", "critic", "lr"]
    assert others == [first] * 4


class Terminal:
    """stderr, as a terminal or a file; `broken` raises that error at each write."""

    encoding = "utf-8"

    def __init__(self, tty: bool, broken: Exception | None = None) -> None:
        self.tty, self.broken, self.text = tty, broken, ""

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        if self.broken is not None:
            raise self.broken
        self.text += text
        return len(text)

    def flush(self) -> None:
        if self.broken is not None:
            raise self.broken


def test_a_file_gets_a_line_per_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(track, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Terminal(tty=False))
    with tracker(tmp_path, total=110, progress=True) as to:
        for _ in range(10):
            now[0] += 0.5
            to.waited(0.125)
            to.stepped()
        to.log(10, "main", {"fit": 0.25, "a": 1.0, "b": 2.0, "c": 3.0})
        to.say("something")
    assert sys.stderr.text == ("step 10/110 main fit=0.25 a=1 b=2 16 images/s wait 25% ETA 0:00:50\nsomething\n")
    assert lines_of(tmp_path) == [
        {"step": 10, "stage": "main", "fit": 0.25, "a": 1.0, "b": 2.0, "c": 3.0}
        | {"images_per_second": 16.0, "data_wait": 0.25}
    ]


def test_time_spent_on_setting_up_and_looking_is_not_the_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(track, "perf_counter", lambda: now[0])
    with tracker(tmp_path) as to:
        now[0] = 50.0
        to.restart()
        to.stepped()
        now[0] = 52.0
        to.log(1, "main", {})
        to.stepped()
        now[0] = 60.0
        to.paused(4.0)
        to.log(2, "main", {})
    assert [line["images_per_second"] for line in to.history] == [4.0, 2.0]


def test_a_terminal_gets_a_bar_and_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(tty=True))
    with tracker(tmp_path, done=50, progress=True) as to:
        assert (to._bar.n, to._bar.total) == (400, 800)
        to.stepped()
        assert to._bar.n == 408
        log(to, 51)
        assert "fit=25.5" in to._bar.postfix
        to.say("something")
    assert "something\n" in sys.stderr.text
    assert "step 51/100" not in sys.stderr.text


def test_nothing_is_shown_without_progress_or_on_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tty in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal(tty))
        with tracker(tmp_path, progress=False) as to:
            log(to, 1)
            to.say("something")
        with Tracker(tmp_path / "other", World(CPU.device, 1, 2), 10, 0, 8, True) as to:
            to.stepped()
            log(to, 1)
            to.say("something")
        assert sys.stderr.text == ""
    assert not (tmp_path / "other").exists()


def test_a_notebook_gets_its_own_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's stderr is no terminal; `tqdm.auto` is the notebook's bar where a kernel can show it."""
    from tqdm.notebook import tqdm_notebook

    made = []

    class Widget(tqdm_notebook):
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def close(self) -> None:
            made.append("closed")

        def __del__(self) -> None: ...

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    monkeypatch.setattr(sys, "stderr", Terminal(tty=False))
    with tracker(tmp_path, progress=True):
        pass
    assert made[0]["total"] == 800
    assert made[1] == "closed"


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "gone"), ValueError("closed file")]
)
def test_a_terminal_that_goes_away_ends_the_display_only(
    tty: bool, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(tty))
    with tracker(tmp_path, progress=True) as to:
        log(to, 1)
        sys.stderr.broken = error
        to.say("something")
        for step in (2, 3):
            to.stepped()
            log(to, step)
            to.say("something")
    assert steps_of(tmp_path) == [1, 2, 3]


@pytest.mark.slow
def test_of_two_processes_the_first_reports(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plain = spawn([Job("plain", "hint", settings={"seed": 3})], tmp_path / "a")["plain"]
    both = spawn([Job("reported", "hint", settings={"seed": 3, "report_to": ["tensorboard"]})], tmp_path / "b")
    for rank in (0, 1):
        assert_same(both["reported"][rank].weights, plain[rank].weights)
    folder = tmp_path / "b" / "reported" / "tensorboard" / "reported"
    assert len(list(folder.glob("events.*"))) == 1
    assert not (tmp_path / "a" / "plain" / "tensorboard").exists()
