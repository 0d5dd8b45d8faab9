"""Options and help of a verb, from its docstring and its defaults."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


def options_of(
    words: list[str], verb: Callable, defaults: dict[str, Any], dotted: Collection[str] = ()
) -> dict[str, Any] | None:
    """A verb's options: `--name value` words over `defaults`, of the same types; None where help was printed.

    Args:
        words: of the command line.
        verb: whose docstring is the help.
        defaults: by name. Where one is text or None, the word is taken as it stands.
        dotted: first parts of dotted keys that are taken too, such as "data" of --data.root DIR; they
            come back together under the name "changes".

    Raises:
        RecipeError: an unknown name, or a value of another type.
    """
    from visiondistill.recipe_files import parse_overrides, split_words
    from visiondistill.schema import RecipeError, nearest

    if asks_help(words, verb):
        return None
    said = split_words(words)
    changes = {name: value for name, value in said.items() if name.partition(".")[0] in dotted and "." in name}
    options: dict[str, Any] = {}
    for name, word in said.items():
        if name in changes:
            continue
        if name not in defaults:
            known = [*defaults, *(f"{part}.KEY" for part in dotted)]
            raise RecipeError(f"unknown option --{name}{nearest(name, known)}; there are --{', --'.join(known)}")
        options[name] = word if defaults[name] is None else _typed(name, word, defaults[name])
    typed = parse_overrides([f"--{name}={word}" for name, word in changes.items()])
    return defaults | options | ({"changes": typed} if dotted else {})


def asks_help(words: list[str], verb: Callable) -> bool:
    """Whether help is asked for; prints it then."""
    asks = "-h" in words or "--help" in words
    if asks:
        print(help_of(verb))
    return asks


def help_of(verb: Callable) -> str:
    """The verb's docstring, as help."""
    return "\n".join(line.removeprefix("    ") for line in (verb.__doc__ or "").rstrip().splitlines())


def _typed(name: str, word: str, default: Any) -> Any:
    from visiondistill.recipe_files import parse_overrides
    from visiondistill.schema import RecipeError

    if isinstance(default, str):
        return word
    value = parse_overrides([f"--{name}={word}"])[name]
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise RecipeError(f"--{name} {word!r}: expected a value like {default!r}")
    return value
