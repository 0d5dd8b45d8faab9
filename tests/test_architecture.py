"""Import directions, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed (extra 'test')")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_engine_names_no_method() -> None:
    names = re.compile(r"\b(ofa|dhkd|dmd2?|boot|pld|trilateral|sinkhorn|freeflow)\b", re.IGNORECASE)
    for path in (ROOT / "visiondistill" / "engine").glob("*.py"):
        assert not names.search(path.read_text()), path


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from visiondistill.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'timm', 'diffusers', 'matplotlib', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["visiondistill", "diffusion"])
def test_no_module_imports_a_heavy_library_at_its_top(package: str) -> None:
    heavy = {"timm", "diffusers", "open_clip", "kornia", "peft", "matplotlib", "transformers"}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert not heavy & {alias.name.partition(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in heavy, path


def test_nothing_unpickles() -> None:
    unsafe = re.compile(r"weights_only\s*=\s*False|pickle\.loads?\(|allow_pickle\s*=\s*True")
    for folder in ("visiondistill", "diffusion", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not unsafe.search(path.read_text()), path
