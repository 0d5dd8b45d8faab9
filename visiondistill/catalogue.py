"""For the verb `methods`: what the recipes say of themselves, in a line each or in full."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from visiondistill import recipes, schema

HEADLINE = re.compile(r"(?P<title>[^:(]+) \((?P<paper>[^()]*\b(?:19|20)\d\d)\)")
"""How the comment on top of a method's recipe begins: title (authors year)."""


class Entry(NamedTuple):
    """A recipe in the list; title and paper stand in the comment on top of its file, and nowhere else.

    Attributes:
        name: by which it is loaded.
        title: of the method; without a paper, the comment's first sentence.
        paper: authors and year, "" where there is none.
        file: below the folder that holds `configs`.
    """

    name: str
    title: str
    paper: str
    file: str

    @property
    def group(self) -> str:
        """Folder below `configs`: "" for the methods."""
        return self.name.rpartition("/")[0]


def entries() -> list[Entry]:
    """The recipes that come with the package, methods first."""
    found = [_entry(name) for name in recipes.names()]
    return sorted(found, key=lambda entry: (entry.group, entry.name))


def listing() -> str:
    """A line for every recipe: methods with their papers, then those of the other folders."""
    lines = []
    for group, members in itertools.groupby(entries(), key=lambda entry: entry.group):
        rows = list(members)
        lines += ["", f"{group}:"] if group else []
        name, title, paper = (_width(row[i] for row in rows if row.paper or not i) for i in range(3))
        for row in rows:
            middle = f"{row.title:<{title}}  {row.paper:<{paper}}" if row.paper else row.title
            lines.append(f"{row.name:<{name}}  {middle}  {row.file}")
    return "\n".join(lines)


def description(name: str) -> str:
    """A recipe's comment, the classes that carry its idea, and its settings with bases merged in.

    Raises:
        RecipeError: no such recipe, or a class of it that is not there.
    """
    config = recipes.load(name)
    return "\n".join([recipes.about(name), "", *_ideas(config), recipes.dump(config).rstrip()])


def _width(cells: Iterable[str]) -> int:
    return max(map(len, cells), default=0)


def _entry(name: str) -> Entry:
    text = " ".join(recipes.about(name).splitlines())
    file = f"{recipes.folder().name}/{name}.yaml"
    headline = HEADLINE.match(text)
    if headline:
        return Entry(name, headline["title"], headline["paper"], file)
    return Entry(name, re.split(r"(?<=\.) ", text)[0], "", file)


def _ideas(config: recipes.Config) -> Iterator[str]:
    from visiondistill.engine import Method
    from visiondistill.parts import Part

    stages = config.get("stages") or {"main": config}
    paths = dict.fromkeys(path for stage in stages.values() for path in _class_paths(stage.get("method")))
    for path in paths:
        target = schema.import_object(path, path)
        # Networks and data are interchangeable; what a recipe is about are its method and its parts.
        if inspect.isclass(target) and issubclass(target, Method | Part):
            yield f"{path}  ({_place(target)})"
            yield from (f"    {line}" for line in _first_paragraph(target))
            yield ""


def _class_paths(node: Any) -> Iterator[str]:
    if schema.is_class(node):
        yield node["class_path"]
    if isinstance(node, dict):
        for value in node.values():
            yield from _class_paths(value)


def _place(target: type) -> str:
    """File and line, the file from its package on: "visiondistill/terms/kl.py:13"."""
    file = Path(inspect.getsourcefile(target) or "")
    package = sys.modules[target.__module__.partition(".")[0]]
    root = Path(package.__file__ or "").parent
    shown = file.relative_to(root.parent) if file.is_relative_to(root) else file
    return f"{shown.as_posix()}:{inspect.getsourcelines(target)[1]}"


def _first_paragraph(target: type) -> list[str]:
    return list(itertools.takewhile(str.strip, (inspect.getdoc(target) or "").splitlines()))
