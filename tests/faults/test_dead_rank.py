"""One of two processes fails: the other ends too, soon, and with an error."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from processes import Act, Job, Nursery, checkpoints, left_behind

LIMIT = 60.0
"""Seconds within which the other process must be gone."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(folder: Path, acts: dict[int, Act], **settings: object) -> list[Job]:
    port = free_port()
    return [
        Job(
            str(folder),
            {"noise_block": 2, **settings},
            (acts[rank],) if rank in acts else (),
            rank=rank,
            size=2,
            port=port,
        )
        for rank in range(2)
    ]


def play(nursery: Nursery, jobs: list[Job]) -> tuple[list[int], list[str], float]:
    """Exit codes and outputs by rank, and the seconds from the death of the first to that of the last."""
    children = [nursery.start(job) for job in jobs]
    failing = next((rank for rank, job in enumerate(jobs) if job.acts), 0)
    codes = {failing: children[failing].wait()}
    died = time.monotonic()
    codes[1 - failing] = children[1 - failing].wait(LIMIT)
    return [codes[0], codes[1]], [child.said for child in children], time.monotonic() - died


def cases() -> list:
    """All ways to fail, each where all meet at every step (they log) and where only gradients do; a few by default."""
    quick = [(1, "step", "raise", 100), (0, "step", "SIGKILL", 1), (1, "step", "SIGKILL", 100)]
    both = [(rank, "step", do, log) for rank in (0, 1) for do in ("raise", "SIGKILL") for log in (1, 100)]
    slow = [pytest.param(*case, marks=pytest.mark.slow) for case in both if case not in quick]
    return [*quick, (0, "save.replace", "raise", 100), *slow]


@pytest.mark.parametrize(("rank", "phase", "do", "log_every"), cases())
def test_the_other_ends(nursery: Nursery, rank: int, phase: str, do: str, log_every: int, tmp_path: Path) -> None:
    jobs = pair(tmp_path / "run", {rank: Act(phase, 6 if phase == "step" else 2, do)}, log_every=log_every)
    codes, said, seconds = play(nursery, jobs)
    assert codes[rank] == (128 + signal.SIGKILL if do == "SIGKILL" else 1), said[rank]
    assert codes[1 - rank] not in (0, None)
    assert seconds < LIMIT
    if do == "raise":
        assert "a defect of this process alone" in said[rank]
    assert checkpoints(tmp_path / "run") == ["step_000000004"]


def test_the_pair_goes_on_afterwards(nursery: Nursery, tmp_path: Path) -> None:
    codes, said, _ = play(nursery, pair(tmp_path / "whole", {}))
    assert codes == [0, 0], said
    play(nursery, pair(tmp_path / "run", {1: Act("step", 17, "SIGKILL")}))
    codes, said, _ = play(nursery, pair(tmp_path / "run", {}))
    assert codes == [0, 0], said
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")
