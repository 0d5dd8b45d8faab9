"""A long run holds no more memory, files and threads at its end than after its beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import Job, Nursery

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux says of a process")

GROWTH = 0.01
"""Of the resident memory, from a tenth of the run to its end."""


def holds_still(nursery: Nursery, folder: Path, steps: int, workers: int = 0) -> None:
    job = Job(str(folder / "run"), {"steps": steps}, kind="soak", workers=workers)
    code, said = nursery.run(job, timeout=900)
    assert code == 0, said
    samples = json.loads((folder / "run.soak").read_text())
    assert len(samples) == 10
    first, last = samples[0], samples[-1]
    print(f"{steps} steps, {workers} workers: {first} -> {last}")
    assert last["resident"] <= first["resident"] * (1 + GROWTH), samples
    assert {sample["threads"] for sample in samples} == {first["threads"]}, samples
    files = [sample["files"] for sample in samples]
    if workers:
        # Batches on their way from a worker hold files too: none stays, so that the least does not rise.
        assert min(files[5:]) <= min(files[:5]), samples
    else:
        assert set(files) == {first["files"]}, samples


def test_two_thousand_steps(nursery: Nursery, tmp_path: Path) -> None:
    holds_still(nursery, tmp_path, 2_000)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "workers"), [(20_000, 0), (5_000, 2)])
def test_many_steps(nursery: Nursery, steps: int, workers: int, tmp_path: Path) -> None:
    holds_still(nursery, tmp_path, steps, workers)
