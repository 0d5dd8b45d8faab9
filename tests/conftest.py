"""Fixtures that several test packages use."""

from __future__ import annotations

import os
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
