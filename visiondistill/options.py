"""Options and help of a verb, from its docstring and its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def options_of(words: list[str], verb: Callable, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """`--name value` words over `defaults`, of the same types; None where help was asked for and given.

    Raises:
        RecipeError: an unknown name, or a value of another type.
    """
    from visiondistill.recipes import RecipeError, parse_overrides

    if asks_help(words, verb):
        return None
    given = parse_overrides(words)
    for name, value in given.items():
        if name not in defaults:
            raise RecipeError(f"unknown option --{name}; there are --{', --'.join(defaults)}")
        if type(value) is not type(defaults[name]):
            raise RecipeError(f"--{name} {value!r}: expected a value like {defaults[name]!r}")
    return defaults | given


def asks_help(words: list[str], verb: Callable, show: bool = True) -> bool:
    """Whether help is asked for; prints it unless told not to."""
    asks = "-h" in words or "--help" in words
    if asks and show:
        print(help_of(verb))
    return asks


def help_of(verb: Callable) -> str:
    """The verb's docstring, as help."""
    return "\n".join(line.removeprefix("    ") for line in (verb.__doc__ or "").rstrip().splitlines())
