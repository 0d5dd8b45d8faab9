"""Recipes as files: YAML that is read strictly, bases merged in, keys overridden, and written back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from visiondistill import schema
from visiondistill.schema import RecipeError

Config = dict[str, Any]

COMPARISONS = "compare"
"""Folder below `configs` whose files are no recipes; see `compare.py`."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with three mends: `2e-4` is a number, `no` is a word, and a key given twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that `_Loader` or a plain YAML reader would take for something else; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
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


def names() -> list[str]:
    """Names of the recipes that come with the package."""
    found = sorted(str(path.relative_to(folder()).with_suffix("")) for path in folder().rglob("*.yaml"))
    return [name for name in found if not name.startswith(f"{COMPARISONS}/")]


def about(name: str) -> str:
    """The comment on top of a recipe that comes with the package: what it is, and how it is called."""
    lines = _path_of(name).read_text().splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").strip() for line in comment) or name


def parse(text: str) -> Any:
    """A YAML text, read as recipes are."""
    return yaml.load(text, _Loader)


def load(recipe: str | Path) -> Config:
    """Read a recipe by file, or by the name that it has in `configs/` ("smoke/kd"), bases merged in.

    Raises:
        RecipeError: no such recipe, not a YAML mapping, or a base that leads back to itself.
    """
    return _load(recipe, ())


def read(path: Path) -> Config:
    """The mapping in a YAML file, as it stands there.

    Raises:
        RecipeError: not readable, or no mapping.
    """
    try:
        with path.open() as file:
            config = yaml.load(file, _Loader)  # from the file itself, so that errors name it
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} must be a mapping of keys to values")
    return config


def _load(recipe: str | Path, seen: tuple[Path, ...]) -> Config:
    path = _path_of(recipe).resolve()
    if path in seen:
        raise RecipeError(f"{path}: its `base` leads back to itself")
    config = read(path)
    base = config.pop("base", None)
    return config if base is None else merge(_load(base, (*seen, path)), config)


def _path_of(recipe: str | Path) -> Path:
    path = Path(recipe)
    if not path.is_file():
        path = folder() / f"{recipe}.yaml"
    if not path.is_file():
        close = schema.nearest(str(recipe), names())
        raise RecipeError(f"no recipe {str(recipe)!r}{close}: name a YAML file or one of {', '.join(names())}")
    return path


def merge(base: Config, changes: Config) -> Config:
    """`changes` over `base`, deeply: another class_path replaces the whole node, null removes an entry."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(old, dict) and _same_class(old, value):
            merged[name] = merge(old, value)
            if name == "init_args":  # with nothing to remove, null is what the constructor gets
                merged[name] |= {key: None for key in value if value[key] is None and key not in old}
        else:
            merged[name] = value
    return merged


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted keys replaced: `{"student.name": "resnet18", "run.seed": 1}`.

    Below a class, a key other than class_path and init_args is one of its arguments.

    Raises:
        RecipeError: a key passes through something that is not a mapping.
    """
    new = _copy(config)
    for path, value in changes.items():
        *outer, name = path.split(".")
        place = new
        for depth, part in enumerate(outer):
            place = _inside(place, part).setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"{path}: '{'.'.join(outer[: depth + 1])}' is a value, it has no '{name}'")
        place = _inside(place, name)
        if name == "class_path" and place.get(name) != value:
            place.pop("init_args", None)
        place[name] = value
    return new


def split_words(words: Sequence[str]) -> dict[str, str]:
    """`["--run.seed", "3", "--run.compile=true"]` as `{"run.seed": "3", "run.compile": "true"}`.

    Raises:
        RecipeError: a word that is not `--key`, or a key without a value.
    """
    said: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise RecipeError(f"{word!r} is not an option: write --key value, for example --run.seed 1")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise RecipeError(f"{word} needs a value")
            value = rest.pop(0)
        said[key] = value
    return said


def parse_overrides(words: Sequence[str]) -> Config:
    """As `split_words`, each value read as YAML: `{"run.seed": 3, "run.compile": True}`.

    Raises:
        RecipeError: as of `split_words`, or a value that is not YAML.
    """
    changes: Config = {}
    for key, value in split_words(words).items():
        try:
            changes[key] = parse(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key}: {value!r} is not readable: {error}") from error
    return changes


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_back(config: Config) -> Config:
    """The config as it is after a way through a file."""
    return parse(dump(config))


def _same_class(old: Config, new: Config) -> bool:
    return "class_path" not in new or new["class_path"] == old.get("class_path")


def _inside(place: Config, name: str) -> Config:
    """Where a dotted key goes on: a class's own arguments need not be spelled `init_args`."""
    if schema.is_class(place) and name not in ("class_path", "init_args"):
        return place.setdefault("init_args", {})
    return place


def _copy(node: Any) -> Any:
    return {name: _copy(value) for name, value in node.items()} if isinstance(node, dict) else node
