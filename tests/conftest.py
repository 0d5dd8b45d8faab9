"""Fixtures that several test packages use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference values (`reference_values/...`): `$VISIONDISTILL_SHARED` or `../shared`."""
    given = os.environ.get("VISIONDISTILL_SHARED")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference_values").is_dir():
        pytest.skip(f"no reference values at {folder}: set VISIONDISTILL_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="module")
def undrawn_reports() -> Iterator[None]:
    """Evaluations without pictures, which take half of a short run; `eval/test_report.py` looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_confusion", "draw_reliability"):
            patch.setattr(f"visiondistill.eval.plots.{name}", lambda report, path: None)
        yield


@pytest.fixture
def equals_golden() -> Callable[[str, dict[str, list[float]]], None]:
    """`equals_golden(name, curve)` holds a curve against `golden/<name>.json`; a missing file is written, and fails."""

    def check(name: str, curve: dict[str, list[float]]) -> None:
        golden = Path(__file__).parent / "golden" / f"{name}.json"
        if not golden.exists():
            golden.write_text(json.dumps(curve, indent=1) + "\n")
            pytest.fail(f"{golden} was missing and has been written: look at it, then run again")
        for entry, expected in json.loads(golden.read_text()).items():
            assert curve[entry] == pytest.approx(expected, rel=1e-10, abs=1e-12)

    return check
