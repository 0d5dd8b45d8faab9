"""Recipes: YAML with class paths and constructor arguments, turned into stages and a run.

One stage, with the parts that people change on top:

    base: kd                                    # another recipe, merged deeply before anything else
    data:    {class_path: visiondistill.data.ImageFolder, init_args: {root: photos}}
    student: {class_path: visiondistill.models.Timm, init_args: {name: resnet18}}
    teacher: {class_path: visiondistill.models.Timm, init_args: {name: resnet50, pretrained: true}}
    method:  {class_path: visiondistill.Distiller, init_args: {terms: {...}}}
    steps: 10000
    optim: {student: {name: adamw, lr: 1.0e-3}}
    run: {output_dir: runs/kd, batch_size: 64}

Several stages stand under `stages`, by name, each with steps, method and optim. Method arguments
called student, teacher and streams are filled from the top where the method leaves them out, and so are a
student's arguments num_classes and input_size, from the data, and teacher (`diffusion.models.lora`); from
the second stage on, so is its first argument, with what the previous stage handed over. A stage that
is handed another argument than the student does not get the student besides, if an earlier one trained it.
`performance: auto` tries before step 1 whether channels-last weights, bf16 and compilation pay here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from visiondistill import schema
from visiondistill.schema import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from visiondistill.data import Source
    from visiondistill.engine import Result, Run, Stage

Config = dict[str, Any]

TOP = ("data", "student", "teacher", "method", "steps", "optim", "stages", "workers", "performance", "run")
STAGE = ("steps", "method", "optim")
FILLED = {"student": "student", "teacher": "teacher", "streams": "data"}
"""Arguments of methods that the top of the recipe gives, and by which key."""
COMPARISONS = "compare"
"""Folder below `configs` whose files are no recipes; see `compare.py`."""
FITTED = ("num_classes", "input_size", "teacher")
"""Arguments of the student that the data give."""


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
            config = yaml.load(file, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} must be a mapping of {', '.join(TOP)}")
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
    """`changes` over `base`, deeply; a class with another path replaces the node, null removes an entry."""
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
            changes[key] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key}: {value!r} is not readable: {error}") from error
    return changes


@dataclass
class Plan:
    """A recipe that was built.

    Attributes:
        stages, run: for `engine.train`.
        kinds: classes of the stages' methods.
        source: the data that the top of the recipe names; None where methods bring their own.
        student, teacher: the networks that it names.
    """

    stages: list[Stage]
    run: Run
    kinds: list[Callable] = field(default_factory=list)
    source: Source | None = None
    student: nn.Module | None = None
    teacher: nn.Module | None = None


def check(config: Config, given: Collection[str] = ()) -> None:
    """Check every key and value against the signatures, without building or reading anything large.

    Args:
        config: see the module.
        given: names of the top (data, student, teacher) that `plan` gets as objects.

    Raises:
        RecipeError: unknown, missing or unfitting keys and values, with the key's whole path.
    """
    from torch import nn

    from visiondistill.engine import Method, Optim, Run

    unknown = [key for key in config if key not in TOP]
    if unknown:
        raise RecipeError(f"{unknown[0]}: no such key{schema.nearest(unknown[0], TOP)}; there are {', '.join(TOP)}")
    if "stages" in config and {"method", "steps", "optim"} & set(config):
        raise RecipeError("stages: give either `stages`, or method, steps and optim for a single one")
    schema.check(_mapping(config, "run"), Run, "run")
    for name, later in (("data", ()), ("student", FITTED), ("teacher", ())):
        if name in config and name not in given:
            _require_class(config[name], name)
            schema.check(config[name], Any if name == "data" else nn.Module, name, later)
    schema.check(config.get("workers", 0), int, "workers")
    schema.check(config.get("performance", "as set"), Literal["as set", "auto"], "performance")
    top, trained = {*config, *given}, False
    for index, (_, where, node) in enumerate(_stages(config)):
        extra = [key for key in node if key not in STAGE]
        if extra:
            raise RecipeError(f"{where}{extra[0]}: no such key{schema.nearest(extra[0], STAGE)}; {', '.join(STAGE)}")
        _require_class(node.get("method"), f"{where}method")
        _require_steps(node.get("steps"), f"{where}steps")
        target = schema.resolve(node["method"]["class_path"], f"{where}method.class_path")
        filled, handed_over = _given_to(index, top, target, node["method"], trained)
        trained |= "student" in filled
        schema.check(node["method"], Method, f"{where}method", [*filled, *handed_over])
        schema.check(node.get("optim", {}), dict[str, Optim], f"{where}optim")


def plan(config: Config, given: Mapping[str, Any] | None = None, source: Source | None = None) -> Plan:
    """Build what a config says: data first, then networks, then methods.

    Args:
        config: see the module.
        given: a `Source` as "data", networks as "student" and "teacher", in place of those of the config.
        source: what the config's data are, where they are built already (`source_of`).

    Raises:
        RecipeError: see `check`; also when a constructor refuses its arguments.
    """
    from torch import nn

    from visiondistill.engine import Method, Optim, Run, Stage

    given = dict(given or {})
    check(config, given)
    run = schema.build(config["run"], Run, "run")
    built = Plan(
        [], run, source=given.get("data") or source, student=given.get("student"), teacher=given.get("teacher")
    )
    if "data" in config and built.source is None:
        built.source = source_of(config)
    streams = None
    if built.source is not None:
        workers = config.get("workers", 0)
        # Methods open what they read: validation images cost nothing where no part asks for them.
        splits = [split for split in ("train", "val") if split in built.source.splits]
        streams = {split: built.source.stream(run.batch_size, workers, split) for split in splits}
    if "teacher" in config and built.teacher is None:
        with _seeded(run.seed, "teacher"):
            built.teacher = schema.build(config["teacher"], nn.Module, "teacher")
    if "student" in config and built.student is None:
        fitted = _fitted(config["student"], built.source, built.teacher)
        with _seeded(run.seed, "student"):
            built.student = schema.build(config["student"], nn.Module, "student", fitted)
    if built.source is not None:
        built.student, built.teacher = (_sized(net, built.source) for net in (built.student, built.teacher))
        _require_classes(built, len(built.source.classes))
    shared = {"student": built.student, "teacher": built.teacher, "streams": streams}
    top, trained = {*config, *given}, False
    for index, (name, where, node) in enumerate(_stages(config)):
        target = schema.resolve(node["method"]["class_path"], f"{where}method")
        names, handed_over = _given_to(index, top, target, node["method"], trained)
        trained |= "student" in names
        filled = {key: shared[key] for key in names}
        make = partial(_make, node["method"], f"{where}method", run.seed, filled, handed_over)
        optim = schema.build(node.get("optim", {}), dict[str, Optim], f"{where}optim")
        method: Method | Callable = make if index else make(None)
        built.kinds.append(target)
        built.stages.append(Stage(name=name, method=method, steps=node["steps"], optim=optim))
    return built


def kinds(config: Config) -> list[Callable]:
    """Classes of the stages' methods.

    Raises:
        RecipeError: one that cannot be imported.
    """
    return [
        schema.resolve(node["method"]["class_path"], f"{where}method.class_path") for _, where, node in _stages(config)
    ]


def source_of(config: Config) -> Source:
    """Build the data that a config names, alone.

    Raises:
        RecipeError: it names none, or they do not fit.
    """
    if "data" not in config:
        raise RecipeError("data: none are named; give --data.root DIR (and --data.class_path, if no image folder)")
    schema.check(config["data"], Any, "data")
    return schema.build(config["data"], Any, "data")


def build(config: Config) -> tuple[list[Stage], Run]:
    """Stages and run of a config; see `plan`."""
    built = plan(config)
    return built.stages, built.run


def run(config: Config) -> Result:
    """Build and train a config, no more; `workbench.run` also measures and exports what data allow."""
    from visiondistill.engine import train

    stages, settings = build(config)
    return train(stages, settings, config=dump(resolve(config)))


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_back(config: Config) -> Config:
    """The config as it is after a way through a file."""
    return yaml.load(dump(config), _Loader)


def resolve(config: Config, given: Collection[str] = ()) -> Config:
    """A checked config with every default written out, so that the run stays the same when a default changes.

    In each mapping the recipe's own choices come first. What `plan` fills in from the top of the
    recipe, from the data or from the stage before is not a default and stays out.

    Args:
        config, given: as of `check`.
    """
    from torch import nn

    from visiondistill.engine import Run

    full = dict(config)
    with_data = "data" in config or "data" in given
    for name, left_out in (("data", ()), ("student", FITTED if with_data else ()), ("teacher", ())):
        if name in config:
            full[name] = schema.complete(config[name], nn.Module, left_out)
    if with_data:
        full.setdefault("workers", 0)
    full["run"] = schema.complete(config["run"], Run)
    stages = {name: _resolved_stage(index, node) for index, (name, _, node) in enumerate(_stages(config))}
    return full | ({"stages": stages} if "stages" in config else stages["main"])


def _resolved_stage(index: int, node: Config) -> Config:
    from visiondistill.engine import Method, Optim

    target = schema.resolve(node["method"]["class_path"], "method.class_path")
    left_out = {*FILLED, *_handed_over(index, (), target, node["method"])}
    given = node.get("optim") or {}
    # Players that are not named get "default"; where the recipe has none, the engine's defaults are it.
    optim = given | {"default": given.get("default", {})}
    return node | {
        "method": schema.complete(node["method"], Method, left_out),
        "optim": schema.complete(optim, dict[str, Optim]),
    }


def _make(node: Config, where: str, seed: int, given: Mapping[str, Any], first: Sequence[str], handover: Any) -> Any:
    from visiondistill.engine import Method

    with _seeded(seed, where):
        return schema.build(node, Method, where, {**given, **dict.fromkeys(first, handover)})


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Initial weights are a function of the run's seed, and building them disturbs nobody's generator."""
    import torch

    from visiondistill.engine.rng import key

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "initial", name))
        yield


def _stages(config: Config) -> list[tuple[str, str, Config]]:
    """(name, path prefix, node) of every stage."""
    if "stages" not in config:
        return [("main", "", {key: config[key] for key in STAGE if key in config})]
    return [(name, f"stages.{name}.", _mapping(config["stages"], name)) for name in _mapping(config, "stages")]


def _given_to(
    index: int, top: Collection[str], target: Callable, node: Config, trained: bool
) -> tuple[list[str], list[str]]:
    """Arguments of a stage's method from the top of the recipe, and from the stage before.

    Args:
        trained: an earlier stage was given the student.
    """
    handed_over = _handed_over(index, top, target, node)
    # What is handed over is then that student: one network would be taught by itself.
    return _filled({*top} - {"student"} if trained and handed_over else top, target, node), handed_over


def _filled(top: Collection[str], target: Callable, node: Config) -> list[str]:
    """Arguments of a stage's method that the top of the recipe gives."""
    own = node.get("init_args") or {}
    takes = schema.parameters_of(target)
    return [name for name, key in FILLED.items() if key in top and name in takes and name not in own]


def _handed_over(index: int, top: Collection[str], target: Callable, node: Config) -> list[str]:
    first = next(iter(schema.parameters_of(target)), None)
    given = {*(node.get("init_args") or {}), *_filled(top, target, node)}
    return [first] if index and first is not None and first not in given else []


def _fitted(node: Config, source: Source | None, teacher: nn.Module | None) -> Config:
    """What others decide about a student: its classes, trained from scratch its image size, whose weights it adapts."""
    own = node.get("init_args") or {}
    takes = schema.parameters_of(schema.resolve(node["class_path"], "student"))
    fitted: Config = {} if teacher is None else {"teacher": teacher}
    if source is not None:
        fitted["num_classes"] = len(source.classes)
    if source is not None and source.input_size is not None and not own.get("pretrained", False):
        fitted["input_size"] = source.input_size
    return {name: value for name, value in fitted.items() if name in takes and name not in own}


def _sized(network: nn.Module | None, source: Source) -> nn.Module | None:
    """A bare classifier takes images as the data have them: then the shapes of its features are known."""
    from visiondistill.models import Network
    from visiondistill.parts import Part

    bare = network is not None and not isinstance(network, Part) and not hasattr(network, "input_size")
    return Network(network, input_size=source.input_size) if bare and source.input_size is not None else network


def _require_classes(built: Plan, classes: int) -> None:
    """Said before a method is built of networks that do not agree: here the cure is known."""
    from visiondistill.models import require_classes

    for role in ("teacher", "student"):
        network = getattr(built, role)
        if network is not None:
            try:
                require_classes(network, classes)
            except ValueError as error:
                raise RecipeError(f"{role}: {error}") from error


def _require_class(node: Any, where: str) -> None:
    if not schema.is_class(node):
        raise RecipeError(f"{where}: expected class_path and init_args, got {node!r}")


def _require_steps(steps: Any, where: str) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise RecipeError(f"{where}: expected a whole number of steps >= 1, got {steps!r}")


def _mapping(config: Config, name: str) -> Config:
    node = config.get(name)
    if not isinstance(node, dict) or not node:
        raise RecipeError(f"{name}: missing, or not a mapping")
    return node


def _same_class(old: Config, new: Config) -> bool:
    return "class_path" not in new or new["class_path"] == old.get("class_path")


def _inside(place: Config, name: str) -> Config:
    """Where a dotted key goes on: a class's own arguments need not be spelled `init_args`."""
    if schema.is_class(place) and name not in ("class_path", "init_args"):
        return place.setdefault("init_args", {})
    return place


def _copy(node: Any) -> Any:
    return {name: _copy(value) for name, value in node.items()} if isinstance(node, dict) else node
