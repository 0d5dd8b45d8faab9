"""What a wheel carries, seen from outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="the package `build` is not installed (extra 'test')")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_recipe_and_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("visiondistill", "diffusion"):
        for path in (ROOT / package).rglob("*"):
            # Pictures of measured results belong to the repository's pages, not to an installation.
            if path.is_file() and path.suffix != ".pyc" and path.parent.name != "results":
                assert path.relative_to(ROOT).as_posix() in held
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"visiondistill/{path.relative_to(ROOT).as_posix()}" in held


def test_installed_wheel_finds_its_recipes_and_digits(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import visiondistill, visiondistill.recipes as recipes; from visiondistill.data import Digits\n"
        "assert visiondistill.__file__.startswith(__import__('os').getcwd()), visiondistill.__file__\n"
        "assert recipes.build(recipes.load('smoke/kd')) and len(Digits('train')) == 1097"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
