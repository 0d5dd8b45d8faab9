"""Recipes: YAML with class paths and constructor arguments, turned into stages and a run.

A recipe of one stage; what people change stands at its top:

    base: kd                                    # another recipe, merged deeply before anything else
    data:    {class_path: visiondistill.data.ImageFolder, init_args: {root: photos}}
    student: {class_path: visiondistill.models.Timm, init_args: {name: resnet18}}
    teacher: {class_path: visiondistill.models.Timm, init_args: {name: resnet50, pretrained: true}}
    method:  {class_path: visiondistill.Distiller, init_args: {terms: {...}}}
    steps: 10000
    optim: {student: {name: adamw, lr: 1.0e-3}}
    run: {output_dir: runs/kd, batch_size: 64}

Several stages stand under `stages`, by name, each with steps, method and optim. Arguments that a
method takes and its `init_args` leave out are filled in: student, teacher and streams from the top
of the recipe; from the second stage on, the first argument with what the stage before handed over.
(Where that argument is not the student and an earlier stage has trained the student, the stage does
not get the student as well.) A student's num_classes and input_size are filled in from the data,
its `teacher` (`diffusion.models.lora`) with the teacher.
`performance: auto` tries before step 1 whether channels-last weights, bf16 and compilation pay here.
How files are found, merged and overridden: `recipe_files`, whose functions stand here too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from visiondistill import schema
from visiondistill.recipe_files import (
    COMPARISONS,
    Config,
    about,
    dump,
    folder,
    load,
    merge,
    names,
    override,
    parse_overrides,
    read,
    read_back,
    split_words,
)
from visiondistill.schema import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from visiondistill.data import Source, Stream
    from visiondistill.engine import Result, Run, Stage

__all__ = [
    "COMPARISONS",
    "Config",
    "Plan",
    "RecipeError",
    "about",
    "build",
    "check",
    "dump",
    "folder",
    "kinds",
    "load",
    "merge",
    "names",
    "override",
    "parse_overrides",
    "plan",
    "read",
    "read_back",
    "resolve",
    "run",
    "source_of",
    "split_words",
]

TOP = ("data", "student", "teacher", "method", "steps", "optim", "stages", "workers", "performance", "run")
STAGE = ("steps", "method", "optim")
FILLED = {"student": "student", "teacher": "teacher", "streams": "data"}
"""Arguments of methods that the top of the recipe fills in, and the key there that gives each."""
FITTED = ("num_classes", "input_size", "teacher")
"""Arguments of a student that the data and the teacher fill in."""


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
    for stage in _wired(config, given):
        schema.check(stage.node["method"], Method, f"{stage.where}method", [*stage.filled, *stage.handed_over])
        schema.check(stage.node.get("optim", {}), dict[str, Optim], f"{stage.where}optim")


def plan(config: Config, given: Mapping[str, Any] | None = None, source: Source | None = None) -> Plan:
    """Build what a config says: data first, then networks, then methods.

    Args:
        config: see the module.
        given: a `Source` as "data", networks as "student" and "teacher", in place of those of the config.
        source: what the config's data are, where they are built already (`source_of`).

    Raises:
        RecipeError: see `check`; also when a constructor refuses its arguments.
    """
    from visiondistill.engine import Run

    given = dict(given or {})
    check(config, given)
    built = Plan(
        [],
        schema.build(config["run"], Run, "run"),
        source=given.get("data") or source,
        student=given.get("student"),
        teacher=given.get("teacher"),
    )
    if "data" in config and built.source is None:
        built.source = source_of(config)
    _build_networks(config, built)
    _build_stages(config, given, built)
    return built


def kinds(config: Config) -> list[Callable]:
    """Classes of the stages' methods.

    Raises:
        RecipeError: one that cannot be imported.
    """
    return [
        schema.import_object(node["method"]["class_path"], f"{where}method.class_path")
        for _, where, node in _stages(config)
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
    """Build and train a config, no more; `workbench.run` also checks, measures and exports."""
    from visiondistill.engine import train

    stages, settings = build(config)
    return train(stages, settings, config=dump(resolve(config)))


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

    target = schema.import_object(node["method"]["class_path"], "method.class_path")
    left_out = {*FILLED, *_handed_over(index, (), target, node["method"])}
    given = node.get("optim") or {}
    # Players that are not named get "default"; where the recipe has none, the engine's defaults are it.
    optim = given | {"default": given.get("default", {})}
    return node | {
        "method": schema.complete(node["method"], Method, left_out),
        "optim": schema.complete(optim, dict[str, Optim]),
    }


def _build_networks(config: Config, built: Plan) -> None:
    """The networks of the recipe's top that are not given, fitted to the data."""
    from torch import nn

    if "teacher" in config and built.teacher is None:
        with _seeded(built.run.seed, "teacher"):
            built.teacher = schema.build(config["teacher"], nn.Module, "teacher")
    if "student" in config and built.student is None:
        fitted = _fitted(config["student"], built.source, built.teacher)
        with _seeded(built.run.seed, "student"):
            built.student = schema.build(config["student"], nn.Module, "student", fitted)
    if built.source is not None:
        built.student, built.teacher = (_sized(net, built.source) for net in (built.student, built.teacher))
        _require_classes(built, len(built.source.classes))


def _build_stages(config: Config, given: Collection[str], built: Plan) -> None:
    """The stages: the first with its method, later ones with what makes it once the stage before has trained."""
    from visiondistill.engine import Optim, Stage

    shared = {"student": built.student, "teacher": built.teacher, "streams": _streams(config, built)}
    for index, (name, where, node, target, filled, handed_over) in enumerate(_wired(config, given)):
        arguments = {key: shared[key] for key in filled}
        make = partial(_make, node["method"], f"{where}method", built.run.seed, arguments, handed_over)
        optim = schema.build(node.get("optim", {}), dict[str, Optim], f"{where}optim")
        built.kinds.append(target)
        built.stages.append(Stage(make if index else make(None), node["steps"], optim, name))


def _streams(config: Config, built: Plan) -> dict[str, Stream] | None:
    if built.source is None:
        return None
    # Methods open what they read: validation images cost nothing where no part asks for them.
    splits = [split for split in ("train", "val") if split in built.source.splits]
    return {split: built.source.stream(built.run.batch_size, config.get("workers", 0), split) for split in splits}


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


class _Wired(NamedTuple):
    """A stage of a config, and where its method's arguments come from besides its `init_args`.

    Attributes:
        name, where, node: as of `_stages`.
        target: the method's class.
        filled: arguments that the top of the recipe gives.
        handed_over: the argument that the stage before gives, if any.
    """

    name: str
    where: str
    node: Config
    target: Callable
    filled: list[str]
    handed_over: list[str]


def _wired(config: Config, given: Collection[str]) -> Iterator[_Wired]:
    """Every stage, in order.

    Raises:
        RecipeError: unknown keys, no method or steps, a class that cannot be imported.
    """
    top, trained = {*config, *given}, False
    for index, (name, where, node) in enumerate(_stages(config)):
        _check_stage(node, where)
        target = schema.import_object(node["method"]["class_path"], f"{where}method.class_path")
        handed_over = _handed_over(index, top, target, node["method"])
        # What is handed over is then that student: one network would be taught by itself.
        without = {"student"} if trained and handed_over else set()
        filled = _filled(top - without, target, node["method"])
        trained |= "student" in filled
        yield _Wired(name, where, node, target, filled, handed_over)


def _check_stage(node: Config, where: str) -> None:
    extra = [key for key in node if key not in STAGE]
    if extra:
        raise RecipeError(f"{where}{extra[0]}: no such key{schema.nearest(extra[0], STAGE)}; {', '.join(STAGE)}")
    _require_class(node.get("method"), f"{where}method")
    _require_steps(node.get("steps"), f"{where}steps")


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
    """Arguments of a student that follow from the rest: classes, the teacher, and (untrained) the image size."""
    own = node.get("init_args") or {}
    takes = schema.parameters_of(schema.import_object(node["class_path"], "student"))
    fitted: Config = {} if teacher is None else {"teacher": teacher}
    if source is not None:
        fitted["num_classes"] = len(source.classes)
    if source is not None and source.input_size is not None and not own.get("pretrained", False):
        fitted["input_size"] = source.input_size
    return {name: value for name, value in fitted.items() if name in takes and name not in own}


def _sized(network: nn.Module | None, source: Source) -> nn.Module | None:
    """A bare classifier as a `Network` of the data's image size, so that the shapes of its features are known."""
    from visiondistill.models import Network
    from visiondistill.parts import Part

    bare = network is not None and not isinstance(network, Part) and not hasattr(network, "input_size")
    return Network(network, input_size=source.input_size) if bare and source.input_size is not None else network


def _require_classes(built: Plan, classes: int) -> None:
    """Check both networks' classes against the data's, before a method is built of them: here the cure is known."""
    from visiondistill.models import require_classes

    try:
        require_classes(built.teacher, classes)
    except ValueError as error:
        raise RecipeError(f"teacher: {error}") from error
    known = getattr(built.student, "num_classes", None)
    if known not in (None, classes):
        raise RecipeError(f"student: it has {known} classes, but the data has {classes}: give it num_classes {classes}")


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
