"""Vision distillation on one training engine. Names below are imported on first use."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("visiondistill")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "Distiller": "visiondistill.distiller",
    "Method": "visiondistill.engine",
    "Optim": "visiondistill.engine",
    "Run": "visiondistill.engine",
    "Stage": "visiondistill.engine",
    "distill": "visiondistill.workbench",
    "train": "visiondistill.engine",
}
_SUBMODULES = (
    "augmentors",
    "data",
    "engine",
    "eval",
    "export",
    "heads",
    "losses",
    "models",
    "teachers",
    "terms",
    "weighting",
)

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
