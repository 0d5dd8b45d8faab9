"""What networks built from a name share: where their weights come from, a new head, a frozen trunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from torch import nn

from visiondistill.models.network import Network
from visiondistill.weights import WeightsSource

Trainable = Literal["all", "head"]

FINETUNE = "visiondistill train --recipe finetune --student.name NAME --data.root DIR"
"""What makes a teacher of any timm model NAME on the classes of a folder."""

OF_THE_HEAD = ("label_names", "label_descriptions")
"""Entries of timm's configuration that name the classes of the head that came with the weights."""


class LoadedNetwork(Network):
    """A `Network` that knows where its weights come from and what of it trains.

    With `trainable="head"` only the classifier gets gradients and learns. The rest keeps its values and
    stays in eval mode, BatchNorm statistics and dropout included, also while the network is trained.

    Args:
        model, mean, std, input_size, interpolation: as of `Network`.
        source: of the weights.
        trainable: "all", or "head" alone.
        crop_pct: share of an image's side that the model's evaluation crops, in (0, 1]. It is told to
            whoever prepares images; the network itself crops nothing.

    Raises:
        ValueError: another `trainable`.
        TypeError: "head" of a model without `get_classifier`, as timm's models have it.
    """

    PROVENANCE: ClassVar = ("name", "source")
    """What a run that is continued may have found elsewhere."""

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        input_size: tuple[int, int, int] | None,
        interpolation: Literal["bilinear", "bicubic"],
        source: WeightsSource,
        trainable: Trainable,
        crop_pct: float,
    ) -> None:
        super().__init__(model, mean, std, input_size, interpolation)
        if trainable not in ("all", "head"):
            raise ValueError(f"trainable must be 'all' or 'head', got {trainable!r}")
        self.source, self.trainable, self.crop_pct = source, trainable, crop_pct
        if trainable == "head":
            heads = list(_classifiers(model))
            model.requires_grad_(False).eval()
            for head in heads:
                head.requires_grad_(True).train()

    @property
    def finetune_command(self) -> str:
        """What makes a teacher of other classes of this network, on the command line."""
        return FINETUNE

    def train(self, mode: bool = True) -> LoadedNetwork:
        super().train(mode)
        if self.trainable == "head":
            self.model.eval()
            for head in _classifiers(self.model):
                head.train(mode)
        return self


def require_classes(network: nn.Module, classes: int, what: str = "the data") -> None:
    """Check that a teacher tells as many classes apart as there are.

    Args:
        network: a `Network`, or anything with `num_classes`; anything else passes.
        classes: how many there are.
        what: who has so many classes, for the message.

    Raises:
        ValueError: it does not; the message has the command that makes such a teacher.
    """
    known = getattr(network, "num_classes", None)
    if known is not None and known != classes:
        raise ValueError(
            f"the teacher {_called(network)} tells {known} classes apart, but {what} has {classes}. "
            f"This makes a teacher of these {classes} classes:\n  {getattr(network, 'finetune_command', FINETUNE)}"
        )


def with_new_head(model: nn.Module, num_classes: int | None) -> None:
    """Put an untrained classifier of `num_classes` in place of the model's.

    Raises:
        ValueError: the count is not given.
        TypeError: the model has no `reset_classifier`, as timm's models have it.
    """
    if not num_classes:
        raise ValueError(f"new_head of {type(model).__name__}: give num_classes, how many classes it tells apart")
    if not hasattr(model, "reset_classifier"):
        raise TypeError(f"new_head: {type(model).__name__} needs the method reset_classifier(num_classes)")
    model.reset_classifier(num_classes)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        model.pretrained_cfg = {key: value for key, value in config.items() if key not in OF_THE_HEAD}


def _classifiers(model: nn.Module) -> Iterator[nn.Module]:
    if not hasattr(model, "get_classifier"):
        raise TypeError(f"trainable 'head': {type(model).__name__} needs the method get_classifier()")
    found = model.get_classifier()
    yield from found if isinstance(found, tuple | list) else (found,)


def _called(network: nn.Module) -> str:
    return getattr(network, "name", None) or type(getattr(network, "model", network)).__name__
