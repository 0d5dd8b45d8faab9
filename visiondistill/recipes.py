"""Recipes: YAML with class paths and constructor arguments, turned into stages and a run.

    stages:
      student:                                  # one entry per stage, in order
        steps: 600
        method:
          class_path: visiondistill.Distiller   # its signature is the schema
          init_args: {...}
        optim:
          student: {name: adamw, lr: 2.0e-3}
    run: {output_dir: runs/kd, batch_size: 64}

From the second stage on, the method's first constructor argument may be left out: it is what the
previous stage handed over.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from visiondistill.engine import Result, Run, Stage

Config = dict[str, Any]


class RecipeError(ValueError):
    """A recipe that cannot be read or does not fit the signatures that it names."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with two mends: `2e-4` is a number, and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> Config:
    names = [loader.construct_object(key) for key, _ in node.value]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{node.start_mark.name}, line {node.start_mark.line + 1}: {twice} given twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def folder() -> Path:
    """Where the recipes that come with the package lie, in a wheel and in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def load(recipe: str | Path) -> Config:
    """Read a recipe by file, or by the name that it has in `configs/` ("smoke/kd").

    Raises:
        RecipeError: no such recipe, or not a YAML mapping.
    """
    path = Path(recipe)
    if not path.is_file():
        path = folder() / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(folder()).with_suffix("")) for p in folder().rglob("*.yaml"))
        raise RecipeError(f"no recipe {str(recipe)!r}: name a YAML file or one of {', '.join(known)}")
    try:
        with path.open() as file:
            config = yaml.load(file, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} must be a mapping with `stages` and `run`")
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted keys replaced: `{"stages.student.steps": 10}`.

    Raises:
        RecipeError: a key passes through something that is not a mapping.
    """
    new = _copy(config)
    for path, value in changes.items():
        *outer, name = path.split(".")
        place = new
        for depth, part in enumerate(outer):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"{path}: '{'.'.join(outer[: depth + 1])}' is a value, it has no '{name}'")
        place[name] = value
    return new


def parse_overrides(words: Sequence[str]) -> Config:
    """`["--run.seed", "3", "--run.compile=true"]` as `{"run.seed": 3, "run.compile": True}`.

    Raises:
        RecipeError: a word that is not `--key`, or a key without a value.
    """
    changes: Config = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"{word!r} is not an option: write --key value, for example --run.seed 1")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise RecipeError(f"{word} needs a value")
            value = rest.pop(0)
        changes[key] = yaml.load(value, _Loader)
    return changes


def build(config: Config) -> tuple[list[Stage], Run]:
    """Stages and run of a config; every key is checked against a signature.

    Raises:
        RecipeError: unknown or missing keys, wrong types or values, with the key named.
    """
    from visiondistill.engine import Method, Optim, Run, Stage

    unknown = sorted(set(config) - {"stages", "run"})
    if unknown:
        raise RecipeError(f"unknown top-level keys {unknown}; a recipe has `stages` and `run`")
    stages = []
    for index, (name, node) in enumerate(_mapping(config, "stages").items()):
        node = _mapping(config["stages"], name)
        extra = sorted(set(node) - {"steps", "method", "optim"})
        if extra:
            raise RecipeError(f"stages.{name}: unknown keys {extra}; a stage has steps, method and optim")
        kind = Callable[[Any], Method] if index and _is_handed_over(node.get("method")) else Method
        schema = {"method": kind, "steps": int, "optim": dict[str, Optim]}
        stages.append(Stage(name=name, **_instantiate({"optim": {}} | node, schema, f"stages.{name}")))
    return stages, _instantiate({"run": _mapping(config, "run")}, {"run": Run}, "")["run"]


def run(config: Config) -> Result:
    """Build and train a config; keeps the resolved config as `config.yaml` in the run folder."""
    from visiondistill.engine import train

    stages, settings = build(config)
    return train(stages, settings, config=yaml.safe_dump(config, sort_keys=False))


def _instantiate(values: Config, schema: Mapping[str, Any], where: str) -> Config:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    for name, kind in schema.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    try:
        return vars(parser.instantiate(parser.parse_object(values)))
    except (ArgumentError, TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from error


def _is_handed_over(method: Any) -> bool:
    if not isinstance(method, dict) or not isinstance(method.get("class_path"), str):
        return False
    module, _, name = method["class_path"].rpartition(".")
    try:
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError):
        return False  # jsonargparse says better what is wrong with the path
    return next(iter(parameters), None) not in (method.get("init_args") or {})


def _mapping(config: Config, name: str) -> Config:
    node = config.get(name)
    if not isinstance(node, dict) or not node:
        raise RecipeError(f"`{name}` is missing or not a mapping")
    return node


def _copy(node: Any) -> Any:
    return {name: _copy(value) for name, value in node.items()} if isinstance(node, dict) else node
