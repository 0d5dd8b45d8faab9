"""What exports of every kind share: what their cards say, and a folder that is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FACTS = "export.json"
"""The file by which a folder is known for an export."""


@dataclass(frozen=True)
class About:
    """What the weights cannot say of themselves; all of it goes into the model card.

    Attributes:
        name: of the model, in a word; in timm's folders also the tag of the weights.
        data: what it was trained and measured on, such as `Source.describe().as_dict()`, or a sentence.
        teacher: who taught it, in a sentence.
        method: how: a sentence, or the recipe.
        metrics: figures with what they need to be read: n, split (see `AccuracyReport.to_dict`), extractor, steps.
        license: an SPDX identifier. The source of pretrained weights or of the data may bind it;
            None leaves it unsaid rather than repeating the source's.
    """

    name: str = "student"
    data: Mapping[str, Any] | str = ""
    teacher: str = ""
    method: Mapping[str, Any] | str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None


def training_section(about: Mapping[str, Any]) -> str:
    """Of a model card: what `About` (as a dict) says of teacher, data, method and licence."""
    short = {key: about[key] for key in ("teacher", "data", "method") if isinstance(about[key], str)}
    lines = [f"- {key}: {said or 'not stated'}" for key, said in short.items()]
    lines.append(f"- licence: {about['license'] or 'not stated'}")
    blocks = [
        f"{key.capitalize()}:\n\n```json\n{json.dumps(about[key], indent=1, ensure_ascii=False, default=str)}\n```"
        for key in ("data", "method")
        if key not in short
    ]
    return "\n\n".join(["\n".join(lines), *blocks])


def check_free(folder: Path) -> None:
    """Raises ValueError unless `folder` is new, empty, or an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FACTS).is_file():
        raise ValueError(f"{folder} holds something that is not an earlier export: choose a new folder")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write into; at the end it gets the name `folder`, in place of an earlier export.

    After an error or a kill nothing of it bears that name.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            # Without its name first: half deleted, it would not be known for an earlier export.
            discarded = folder.with_name(f".{folder.name}.discarded")
            shutil.rmtree(discarded, ignore_errors=True)
            os.replace(folder, discarded)
            shutil.rmtree(discarded)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
