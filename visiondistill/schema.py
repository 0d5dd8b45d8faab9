"""Config nodes against signatures: checked first, so that an error names the whole path of the key, then built.

A node `{class_path: package.Class, init_args: {...}}` is a class with its constructor's arguments;
the signature is the only schema. Types of leaves are judged and converted by jsonargparse.
"""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Node = Any


class RecipeError(ValueError):
    """A recipe that cannot be read or does not fit the signatures that it names."""

    exit_code = 2


class Unsaid:
    """Stands for a default that a YAML file cannot say: an object, a function, a number that is not finite."""


def is_class(node: Node) -> bool:
    return isinstance(node, Mapping) and "class_path" in node


def import_object(path: str, where: str) -> Callable[..., Any]:
    """The class or function that `path` names.

    Raises:
        RecipeError: there is no such module or name; the nearest name is told.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise RecipeError(f"{where}: {path!r} is not a class path; write package.module.Class")
    try:
        module = import_module(module_name)
    except Exception as error:
        # What a package does wrong while it is imported is its author's to see, unless it is the wrong package.
        cure = shadowed(module_name)
        if not isinstance(error, ImportError) and not cure:
            raise
        raise RecipeError(f"{where}: {path!r} cannot be imported: {error}{cure}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        close = nearest(name, dir(module))
        raise RecipeError(f"{where}: {module_name} has no {name!r}{close}{shadowed(module_name)}") from None


def shadowed(module_name: str) -> str:
    """After a failed import: another package in the way of one that is installed with this one, and the cure.

    Returns:
        A clause for the end of a message; "" where nothing is in the way.
    """
    top = module_name.partition(".")[0]
    own, spec = Path(__file__).resolve().parents[1] / top, find_spec(top)
    if top not in _companions() or spec is None:
        return ""
    found = Path(spec.origin if spec.has_location else next(iter(spec.submodule_search_locations)))
    if not found.resolve().is_relative_to(own):
        return (
            f"; {top!r} is {found} here, another package than the one that comes with {__package__} ({own}): "
            f"rename or uninstall the other one, or take its folder off PYTHONPATH and start from another folder"
        )
    others = sorted(set(packages_distributions().get(top, ())) - {__package__})
    if not others:
        return ""
    return (
        f"; {', '.join(others)} installed a package {top!r} into the one that comes with {__package__} ({own}): "
        f"uninstall it, then install {__package__} again"
    )


def _companions() -> set[str]:
    """Top-level packages that are installed with this one and add commands to it."""
    try:
        points = distribution(__package__).entry_points
    except PackageNotFoundError:  # run from a source tree that is not installed
        return set()
    return {point.module.partition(".")[0] for point in points} - {__package__}


def parameters_of(target: Callable) -> dict[str, inspect.Parameter]:
    """Constructor arguments by name, with their annotations resolved."""
    function = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    hints = typing.get_type_hints(target if is_dataclass(target) else function)
    parameters = inspect.signature(target).parameters
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def takes_any(target: Callable) -> bool:
    """Whether the constructor takes `**keywords`, so that unknown names are its own business."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())


def check(node: Node, kind: Any, where: str, later: Sequence[str] = ()) -> None:
    """Check a node against a type, without building anything.

    Args:
        node: what the YAML says.
        kind: annotation of the argument that it is for.
        where: the node's whole path, for messages.
        later: arguments of this node's own constructor that are given when it is built.

    Raises:
        RecipeError: unknown, missing or unfitting keys and values.
    """
    if is_class(node):
        extra = sorted(set(node) - {"class_path", "init_args"})
        if extra:
            raise RecipeError(f"{where}.{extra[0]}: a class has class_path and init_args only")
        target = import_object(node["class_path"], f"{where}.class_path")
        _check_kind(target, kind, where)
        check_arguments(node.get("init_args") or {}, target, where, later)
        return
    option = dataclass_of(kind)
    if option is not None and isinstance(node, Mapping):
        check_arguments(node, option, where)
        _construct(option, {name: _leaf(value, Any, where) for name, value in node.items()}, where)
        return
    entry = _entry_kind(kind)
    if isinstance(node, Mapping) and entry is not None:
        for name, value in node.items():
            check(value, entry, f"{where}.{name}")
        return
    _leaf(node, kind, where)


def check_arguments(arguments: Node, target: Callable, where: str, later: Sequence[str] = ()) -> None:
    """Check a constructor's arguments; see `check`."""
    if not isinstance(arguments, Mapping):
        raise RecipeError(f"{where}: expected arguments by name, got {arguments!r}")
    parameters = parameters_of(target)
    for name, value in arguments.items():
        if name not in parameters:
            if takes_any(target):
                continue
            raise RecipeError(
                f"{where}.{name}: {target.__name__} takes no such key{nearest(name, parameters)}; "
                f"it takes {', '.join(parameters)}"
            )
        check(value, parameters[name].annotation, f"{where}.{name}")
    absent = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in arguments and name not in later
    ]
    if absent:
        raise RecipeError(f"{where}.{absent[0]}: {target.__name__} needs this key")


def build(node: Node, kind: Any, where: str, given: Mapping[str, Any] | None = None) -> Any:
    """Build what `check` has checked; `given` are arguments of this node's own constructor.

    Raises:
        RecipeError: a constructor refused its arguments.
    """
    if is_class(node):
        target = import_object(node["class_path"], where)
        parameters = parameters_of(target)
        arguments = {
            name: build(value, parameters[name].annotation if name in parameters else Any, f"{where}.{name}")
            for name, value in (node.get("init_args") or {}).items()
        }
        return _construct(target, arguments | dict(given or {}), where)
    option = dataclass_of(kind)
    if option is not None and isinstance(node, Mapping):
        hints = {name: p.annotation for name, p in parameters_of(option).items()}
        return _construct(option, {n: build(v, hints[n], f"{where}.{n}") for n, v in node.items()}, where)
    entry = _entry_kind(kind)
    if isinstance(node, Mapping) and entry is not None:
        return {name: build(value, entry, f"{where}.{name}") for name, value in node.items()}
    return _leaf(node, kind, where)


def complete(node: Node, kind: Any, left_out: Collection[str] = ()) -> Node:
    """A checked node, with the defaults of every signature that it names written out.

    What the node says comes first, in its own order, because arguments are built in that order and
    networks draw their initial weights when they are built; defaults follow in the signature's
    order. A default is left out where a file cannot say it: objects, functions, and whatever its
    own annotation would read back as something else.

    Args:
        node, kind: as of `check`.
        left_out: arguments of this node's own constructor whose defaults are not written.
    """
    if is_class(node):
        given = node.get("init_args") or {}
        arguments = _completed(given, import_object(node["class_path"], "class_path"), left_out)
        if is_class(given):
            # A class that is itself told a class path and arguments, which it hands on as they are.
            arguments["init_args"] = _handed_on(given, arguments)
        return {**node, "init_args": arguments} if arguments else dict(node)
    option, entry = dataclass_of(kind), _entry_kind(kind)
    if isinstance(node, Mapping) and option is not None:
        return _completed(node, option, left_out)
    if isinstance(node, Mapping) and entry is not None:
        return {name: complete(value, entry) for name, value in node.items()}
    return node


def nearest(name: str, names: Any, count: int = 1) -> str:
    close = difflib.get_close_matches(str(name), [str(n) for n in names if not str(n).startswith("_")], n=count)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def dataclass_of(kind: Any) -> type | None:
    """The dataclass that an annotation asks for, if it asks for one."""
    return next((option for option in _options(kind) if is_dataclass(option)), None)


def _completed(arguments: Node, target: Callable, left_out: Collection[str]) -> dict[str, Node]:
    parameters = parameters_of(target)
    kinds = {name: parameter.annotation for name, parameter in parameters.items()}
    given = {name: complete(value, kinds.get(name, Any)) for name, value in arguments.items()}
    return given | _defaults(target, kinds, {*given, *left_out})


def _handed_on(node: Node, outer: Collection[str]) -> dict[str, Node]:
    """Arguments of the class that `node` names, with the defaults that the `outer` class has no argument for."""
    target = import_object(node["class_path"], "class_path")
    given = dict(node.get("init_args") or {})
    # Nothing reads them by their annotations.
    kinds = dict.fromkeys(inspect.signature(target).parameters, Any)
    return given | _defaults(target, kinds, {*given, *outer})


def _defaults(target: Callable, kinds: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Node]:
    """Defaults of a constructor that a file can say, in the signature's order."""
    values = {name: p.default for name, p in inspect.signature(target).parameters.items()}
    if is_dataclass(target):
        # A signature hides those that are made anew each time.
        values |= {f.name: f.default_factory() for f in fields(target) if f.default_factory is not MISSING}
    said = {name: _said(values[name], kind) for name, kind in kinds.items() if name not in left_out}
    return {name: value for name, value in said.items() if value is not Unsaid}


def _said(default: Any, kind: Any) -> Node:
    """A default as YAML has it; `Unsaid` where reading that would give something else."""
    value = _plain(default)
    if value is Unsaid or kind in (Any, inspect.Parameter.empty):
        # Without an annotation nothing turns a list back into the tuple that the code may rely on.
        return value if value is Unsaid or value == default else Unsaid
    try:
        return value if _plain(build(value, kind, "default")) == value else Unsaid
    except RecipeError:
        return Unsaid


def _plain(value: Any) -> Node:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) in (tuple, list):
        entries = [_plain(entry) for entry in value]
        return Unsaid if Unsaid in entries else entries
    if type(value) is dict and all(type(name) is str for name in value):
        entries = {name: _plain(entry) for name, entry in value.items()}
        return Unsaid if Unsaid in entries.values() else entries
    return Unsaid


def _check_kind(target: Any, kind: Any, where: str) -> None:
    # Protocols are matched by what they do, not by descent: the constructor that gets the object judges it.
    classes = [
        option
        for option in _options(kind)
        if inspect.isclass(option) and option not in (Any, type(None)) and not getattr(option, "_is_protocol", False)
    ]
    if inspect.isclass(target) and classes and not issubclass(target, tuple(classes)):
        wanted = " or ".join(option.__name__ for option in classes)
        raise RecipeError(f"{where}.class_path: {target.__name__} is not a {wanted}")


def _options(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _entry_kind(kind: Any) -> Any | None:
    """What the values of a mapping are, where an annotation asks for one."""
    for option in _options(kind):
        origin = typing.get_origin(option)
        if inspect.isclass(origin) and issubclass(origin, Mapping):
            return typing.get_args(option)[1]
    return Any if kind is Any else None


def _leaf(value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {value} is not a usable number")
    if kind is Any or kind is inspect.Parameter.empty or (value is None and type(None) in _options(kind)):
        return value
    if type(value) is kind and kind in (bool, int, float, str):
        return value  # most leaves: a parser for each would cost a millisecond
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.parse_object({"value": value}).value
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(value, Mapping) and _asks_class(kind):
            raise RecipeError(
                f"{where}: {dict(value)!r} does not say which {_name(kind)} it is: write it as "
                f"{{class_path: package.module.Class, init_args: {{{', '.join(f'{name}: ...' for name in value)}}}}}"
            ) from error
        reason = str(error).splitlines()[-1].strip()
        raise RecipeError(f"{where}: {value!r} does not fit {_name(kind)} ({reason})") from error


def _asks_class(kind: Any) -> bool:
    """Whether an annotation asks for objects that only `class_path` can name."""
    return any(inspect.isclass(option) and option.__module__ != "builtins" for option in _options(kind))


def _name(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", "")


def _construct(target: Callable, arguments: Mapping[str, Any], where: str) -> Any:
    try:
        return target(**arguments)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise RecipeError(f"{where}: {error}") from error
