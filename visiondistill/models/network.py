"""The adapter between a batch and a classifier: own normalisation, own size, features by stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

Shape = tuple[int, ...]

MODEL = "model."
"""Before the model's own names, in those of a `Network`."""


class Outputs(NamedTuple):
    """What a network gives.

    Attributes:
        logits: `[B, K]`.
        features: `{stage: [B, C, H, W]}` of the stages that were asked for.
        embedding: `[B, D]`, pooled, as the classifier reads it; None where it was not asked for.
        prefixes: `{stage: [B, n, C]}`, the class and register tokens of a token model; empty for others.
    """

    logits: Tensor
    features: dict[int, Tensor]
    embedding: Tensor | None = None
    prefixes: dict[int, Tensor] | None = None


class Network(nn.Module):
    """A classifier that takes images in [0, 1] of any size and prepares them as it was trained.

    Stages are what timm calls intermediates: `model.forward_intermediates(x, indices=...)` gives
    `(final features, [NCHW maps])` and `model.forward_head(final)` the logits, with `pre_logits=True`
    the embedding. Models without these serve everything but feature terms.

    Args:
        model: classifier of normalised images, `[B, C, H, W] -> [B, K]`.
        mean, std: per channel, in units of [0, 1] pixels; None leaves pixels as they are.
        input_size: `(C, H, W)` that the model expects. Images of another size are resized to it,
            with antialiasing. None takes every size as it comes.
        interpolation: of the resizing. Bicubic overshoot is cut off at [0, 1], as image libraries do.

    Raises:
        ValueError: only one of mean and std, unequal lengths, or a std that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: tuple[int, int, int] | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        super().__init__()
        self.model = model
        self.input_size = None if input_size is None else tuple(input_size)
        self.interpolation = interpolation
        self.normalizes = mean is not None
        scale, shift = _folded(mean, std)
        # Not persistent: a state_dict then is the model's own, and loads without us.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self._shapes: dict[Shape, list[Shape]] = {}
        self._has_prefixes = bool(getattr(model, "num_prefix_tokens", 0)) and "return_prefix_tokens" in (
            inspect.signature(model.forward_intermediates).parameters
        )
        classifier = getattr(model, "get_classifier", lambda: None)()
        # Several classifiers (distilled models, CrossViT): what they make of the pooled tokens is their own business.
        self._classifies_pooled = isinstance(classifier, nn.Module) and not isinstance(classifier, nn.ModuleList)

    def forward(self, images: Tensor, stages: tuple[int, ...] = (), embedding: bool = False) -> Outputs:
        """Logits and, from the same pass, features of some stages and the embedding.

        Args:
            images: `[B, C, H, W]`, floating in [0, 1].
            stages: numbers from 0; see `stage_index`.
            embedding: also give what the classifier reads.

        Raises:
            TypeError: stages or the embedding are asked of a model that cannot give them.
        """
        x = self.prepare(images)
        if not stages and not embedding:
            return Outputs(self.model(x), {})
        self._require_stages()
        final, features, prefixes = self._intermediates(x, sorted(set(stages)))
        if not embedding:
            return Outputs(self.model.forward_head(final), features, None, prefixes)
        pooled = self.model.forward_head(final, pre_logits=True)
        logits = self.model.get_classifier()(pooled) if self._classifies_pooled else self.model.forward_head(final)
        return Outputs(logits, features, pooled, prefixes)

    def _intermediates(self, x: Tensor, stages: list[int]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        asked = stages or [0]
        if not self._has_prefixes:
            final, maps = self.model.forward_intermediates(x, indices=asked)
            return final, dict(zip(stages, maps, strict=False)), {}
        final, pairs = self.model.forward_intermediates(x, indices=asked, return_prefix_tokens=True)
        maps, prefixes = zip(*pairs, strict=True)
        return final, dict(zip(stages, maps, strict=False)), dict(zip(stages, prefixes, strict=False))

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the model takes them: its precision, size and normalisation."""
        x = images.to(self.scale.dtype)
        if self.input_size is not None and x.shape[-2:] != self.input_size[1:]:
            x = interpolate(x, self.input_size[1:], mode=self.interpolation, antialias=True)
            x = x.clamp(0, 1) if self.interpolation == "bicubic" else x
        return x * self.scale + self.shift if self.normalizes else x

    @property
    def num_classes(self) -> int | None:
        """Classes that the model says it tells apart, if it says so (`model.num_classes`)."""
        return getattr(self.model, "num_classes", None)

    def feature_shapes(self, input_size: tuple[int, int, int] | None = None) -> list[Shape]:
        """`(C, H, W)` of every stage, measured once by a pass in eval mode without gradients.

        Args:
            input_size: `(C, H, W)` of the images; by default the network's own.

        Raises:
            TypeError: the model has no stages.
            ValueError: no size is given and the network has none of its own.
        """
        self._require_stages()
        size = self._size(input_size)
        if size not in self._shapes:
            with evaluating(self), torch.no_grad():
                x = self.prepare(torch.zeros(1, *size, device=self.scale.device))
                _, features = self.model.forward_intermediates(x)
            self._shapes[size] = [tuple(feature.shape[1:]) for feature in features]
        return self._shapes[size]

    def embedding_size(self, input_size: tuple[int, int, int] | None = None) -> int:
        """`D` of the embedding; measured, and errors, as in `feature_shapes`."""
        self._require_stages()
        size = self._size(input_size)
        with evaluating(self), torch.no_grad():
            embedding = self(torch.zeros(1, *size, device=self.scale.device), embedding=True).embedding
        return embedding.shape[1]

    def stage_index(self, stage: int) -> int:
        """`stage` counted from 0, where -1 is the last one.

        Raises:
            ValueError: there is no such stage; further errors as in `feature_shapes`.
        """
        count = len(self.feature_shapes())
        if not -count <= stage < count:
            raise ValueError(f"{self._name} has stages 0 to {count - 1}, got stage {stage}")
        return stage % count

    def no_weight_decay(self) -> set[str]:
        """Parameters that the model wants without weight decay, besides biases and norms; timm's optimisers ask."""
        own = getattr(self.model, "no_weight_decay", None)
        return set() if own is None else {f"{MODEL}{name}" for name in own()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The depth of a parameter by its name, from 0 at the stem; timm's `layer_decay` asks."""
        from timm.models import group_parameters
        from timm.optim import auto_group_layers

        if hasattr(self.model, "group_matcher"):
            depth = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        else:
            depth = auto_group_layers(self.model)
        return lambda name: depth[name.removeprefix(MODEL)]

    def _require_stages(self) -> None:
        if not hasattr(self.model, "forward_intermediates") or not hasattr(self.model, "forward_head"):
            raise TypeError(
                f"{self._name} has no features by stage: it needs the methods forward_intermediates and "
                f"forward_head, as timm's models have them"
            )

    def _size(self, input_size: tuple[int, int, int] | None) -> Shape:
        size = self.input_size if input_size is None else tuple(input_size)
        if size is None:
            raise ValueError(
                f"the shapes of {self._name}'s features depend on the image size: "
                f"give its Network an input_size (C, H, W)"
            )
        return size

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def as_network(module: nn.Module) -> Network:
    """A `Network` as it is; any other module as a network that takes pixels in [0, 1] as they come."""
    return module if isinstance(module, Network) else Network(module)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode within, and every submodule's own mode afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _folded(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """`scale, shift` `[C, 1, 1]` with `(x - mean) / std = scale * x + shift`."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std belong together, got mean={mean} and std={std}")
    mean, std = mean or [0.0], std or [1.0]
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError(f"mean and std need one value per channel and std > 0, got mean={mean} and std={std}")
    scale = 1 / torch.tensor(std, dtype=torch.float64)
    shift = -torch.tensor(mean, dtype=torch.float64) * scale
    return scale.float()[:, None, None], shift.float()[:, None, None]
