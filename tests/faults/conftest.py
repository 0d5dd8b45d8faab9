"""Where the runs of these tests are born."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / "engine"), str(Path(__file__).parent)]

from processes import Job, Nursery, left_behind


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


@pytest.fixture(scope="session")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the uninterrupted run leaves behind; "job" and "seconds" are its own."""
    job = Job(str(tmp_path_factory.mktemp("whole") / "run"))
    started = time.monotonic()
    code, said = nursery.run(job)
    assert code == 0, said
    return left_behind(Path(job.folder)) | {"job": job, "seconds": time.monotonic() - started}
