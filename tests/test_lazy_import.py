"""`import visiondistill` is light; names arrive on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import visiondistill


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_no_torch():
    assert not modules_after("import visiondistill; visiondistill.__version__") & {"torch", "numpy", "timm"}


def test_losses_need_torch_alone():
    loaded = modules_after("from visiondistill import losses; losses.kd_loss")
    assert "torch" in loaded
    assert not loaded & {"timm", "accelerate", "jsonargparse", "matplotlib"}


def test_the_distiller_imports_no_optional_package():
    heavy = {"timm", "diffusers", "open_clip", "kornia", "peft", "matplotlib", "diffusion"}
    assert not modules_after("from visiondistill import Distiller, data, eval, models, teachers, terms") & heavy


@pytest.mark.parametrize("name", visiondistill.__all__)
def test_every_public_name_is_there(name):
    assert getattr(visiondistill, name) is not None
    assert name in dir(visiondistill)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Distillery'"):
        visiondistill.Distillery  # noqa: B018
