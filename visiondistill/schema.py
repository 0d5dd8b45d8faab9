"""Config nodes against signatures: checked first, with the whole path of a wrong key, then built.

A node `{class_path: package.Class, init_args: {...}}` is a class with its constructor's arguments;
the signature is the schema, there is no other. Leaf types are judged and converted by jsonargparse.
"""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

Node = Any


class RecipeError(ValueError):
    """A recipe that cannot be read or does not fit the signatures that it names."""

    exit_code = 2


class Missing:
    """Stands for an argument that is given later (the student, the streams, what a stage hands over)."""


def is_class(node: Node) -> bool:
    return isinstance(node, Mapping) and "class_path" in node


def resolve(path: str, where: str) -> type:
    """The class or function that `path` names.

    Raises:
        RecipeError: there is no such module or name; the nearest name is told.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise RecipeError(f"{where}: {path!r} is not a class path; write package.module.Class")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise RecipeError(f"{where}: {path!r} cannot be imported: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise RecipeError(f"{where}: {module_name} has no {name!r}{nearest(name, dir(module))}") from None


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
        target = resolve(node["class_path"], f"{where}.class_path")
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
        target = resolve(node["class_path"], where)
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


def nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(n) for n in names if not str(n).startswith("_")], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def dataclass_of(kind: Any) -> type | None:
    """The dataclass that an annotation asks for, if it asks for one."""
    return next((option for option in _options(kind) if is_dataclass(option)), None)


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
    if kind is Any or kind is inspect.Parameter.empty:
        return value
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.parse_object({"value": value}).value
    except (ArgumentError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RecipeError(f"{where}: {value!r} does not fit {_name(kind)} ({reason})") from error


def _name(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", "")


def _construct(target: Callable, arguments: Mapping[str, Any], where: str) -> Any:
    try:
        return target(**arguments)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise RecipeError(f"{where}: {error}") from error
