"""What a command names: the generator of a run or of a pipeline's folder, and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion.generator import Generator
from visiondistill import measure, recipes
from visiondistill.data import Source
from visiondistill.engine.errors import SettingsError


def generator_of(run: str | None, pipeline: str | None, changes: recipes.Config) -> Generator:
    """A run's export, or what it made where it has none, or a pipeline folder.

    Args:
        run, pipeline: one of them.
        changes: dotted keys, of which `generator.KEY` says how it is opened, as of `Pipeline`; of a run without
            export as of `Trained`, whose `changes` are those of `data.KEY` unless given.

    Raises:
        RecipeError: neither or both of run and pipeline.
        SettingsError: no such folder, or one that cannot be opened.
    """
    if (run is None) == (pipeline is None):
        raise recipes.RecipeError("name a generator: --run FOLDER, or --pipeline FOLDER")
    options = _below("generator.", changes)
    try:
        if run is None:
            return _opened(Path(pipeline), options)
        export = Path(run) / "export"
        return _opened(export, options) if export.is_dir() else _rebuilt(run, options, changes)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def _opened(folder: Path, options: recipes.Config) -> Generator:
    from diffusion.models import open_generator

    return open_generator(folder, **options)


def _rebuilt(run: str, options: recipes.Config, changes: recipes.Config) -> Generator:
    from diffusion.models.trained import Trained

    elsewhere = {name: value for name, value in changes.items() if name.startswith("data.")}
    return Trained(run, **{"changes": elsewhere} | options)


def source_of(run: str | None, changes: recipes.Config) -> Source:
    """The data of a run, those of `--data.KEY`, or the one changed by the other.

    Raises:
        RecipeError: neither names any.
    """
    return recipes.source_of(data_config(run, changes))


def data_config(run: str | None, changes: recipes.Config) -> recipes.Config:
    """A config of nothing but the data that `source_of` builds; empty where none are named."""
    config: dict[str, Any] = {} if run is None else measure.run_config(run)
    data = _below("data.", changes)
    if "data" not in config and data:
        config["data"] = recipes.load(measure.DATA)["data"]
    named = {"data": config["data"]} if "data" in config else {}
    return recipes.override(named, {f"data.{name}": value for name, value in data.items()})


def _below(part: str, changes: recipes.Config) -> recipes.Config:
    return {name.removeprefix(part): value for name, value in changes.items() if name.startswith(part)}
