"""What generators are conditioned on: during training from data or from draws, and when they are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw


class Conditions(Protocol):
    """Conditions and the null ones that stand for "no condition": pairs of equal structure, batch first."""

    def __call__(self, batch: Batch, draw: Draw) -> tuple[Any, Any]:
        """For samples to generate in training: from the batch's streams (prompts) or from the draw (labels)."""
        ...

    def of(self, data: Batch) -> tuple[Any, Any]:
        """Of the real images in one stream's batch."""
        ...

    def at(self, rows: Sequence[int], device: torch.device) -> tuple[Any, Any]:
        """Of the samples with these numbers, when a generator is measured or shown."""
        ...


class ClassLabels:
    """Labels 0 ... num_classes - 1; the null label is `num_classes`.

    Args:
        null: whether the network knows the null label; without it there is no null condition, and
            guidance is refused where it is asked for.

    Raises:
        ValueError: num_classes < 1.
    """

    def __init__(self, num_classes: int, null: bool = True) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} is not allowed: at least 1")
        self.num_classes, self.null = num_classes, null

    def __call__(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Drawn uniformly."""
        return self._with_null(draw.integers("labels", 0, self.num_classes))

    def of(self, data: Batch) -> tuple[Tensor, Tensor | None]:
        """The data's own.

        Raises:
            ValueError: the data have no labels.
        """
        if "label" not in data:
            raise ValueError("the data have no labels, which ClassLabels is to condition on")
        return self._with_null(data["label"])

    def at(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """All classes in turn."""
        return self._with_null(torch.tensor(rows, device=device) % self.num_classes)

    def _with_null(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return labels, torch.full_like(labels, self.num_classes) if self.null else None


class Prompts:
    """Texts that were encoded once; the null condition is the encoding of the empty text.

    Args:
        texts: the prompts.
        embeddings: what a network is given of them: a dict of tensors `[N, ...]`, or of such dicts.
        null: the same of the empty text, `[1, ...]`.
        encoders: where their text encoders lie, for an export.

    Raises:
        ValueError: no text, or embeddings of another number.
    """

    def __init__(self, texts: Sequence[str], embeddings: Any, null: Any, encoders: TextEncoders | None = None) -> None:
        lengths = {len(held) for held in tree_leaves(embeddings)}
        if lengths != {len(texts)} or not texts:
            raise ValueError(f"{len(texts)} prompts with embeddings of lengths {sorted(lengths)}: give one for each")
        self.texts, self.encoders = tuple(texts), encoders
        self._held = {torch.device("cpu"): (embeddings, null)}

    @property
    def digest(self) -> str:
        """sha256 over the texts in their order: what the numbers of prompts mean."""
        return texts_digest(self.texts)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Which of the prompts each text is, int64 `[M]`: the first one where they have it twice.

        Raises:
            ValueError: a text that is none of them.
        """
        row = {text: number for number, text in reversed(list(enumerate(self.texts)))}
        if missing := [text for text in texts if text not in row]:
            raise ValueError(
                f"{len(missing)} of {len(texts)} captions are none of the {len(self.texts)} prompts, such as "
                f"{missing[0]!r}: add them to the file of prompts"
            )
        return torch.tensor([row[text] for text in texts], dtype=torch.int64)

    def __call__(self, batch: Batch, draw: Draw) -> tuple[Any, Any]:
        """Drawn uniformly."""
        return self._at(draw.integers("prompts", 0, len(self.texts)))

    def of(self, data: Batch) -> tuple[Any, Any]:
        """The data's own.

        Raises:
            ValueError: the data have no column "prompt" with the numbers of their prompts.
        """
        if "prompt" not in data:
            raise ValueError(
                'the data have no column "prompt" (which of the prompts each image shows, from 0): '
                "`visiondistill store latents --captions FILE` makes data that have it"
            )
        return self._at(data["prompt"])

    def at(self, rows: Sequence[int], device: torch.device) -> tuple[Any, Any]:
        """All prompts in turn."""
        return self._at(torch.tensor(rows, device=device) % len(self.texts))

    def _at(self, index: Tensor) -> tuple[Any, Any]:
        device = index.device
        if device not in self._held:
            self._held[device] = tree_map(lambda held: held.to(device), next(iter(self._held.values())))
        embeddings, null = self._held[device]
        return (
            tree_map(lambda held: held.index_select(0, index), embeddings),
            tree_map(lambda held: held.expand(len(index), *held.shape[1:]), null),
        )


def texts_digest(texts: Sequence[str]) -> str:
    """sha256 over texts in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@dataclass(frozen=True)
class TextEncoders:
    """Text encoders in a pipeline folder of diffusers.

    Attributes:
        folder: of the pipeline.
        pipeline: its class.
        names: of the subfolders, tokenizers included.
    """

    folder: str
    pipeline: str
    names: tuple[str, ...]
