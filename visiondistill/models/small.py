"""Nets of a few thousand parameters, for images of a few pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """3x3 convolutions, one per stage; then pooling and a linear layer.

    Args:
        widths: channels of each stage.
        norm: "group" normalises each image on its own (one group), "batch" over the batch, "none" not at all.
        in_channels, num_classes: of the images and the task.
        stride: of every stage but the first: at 2 each has half the resolution of the one before.
        pool: "mean" or "max" over positions; the latter says what is there, wherever it is.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32),
        norm: Literal["group", "batch", "none"] = "group",
        in_channels: int = 1,
        num_classes: int = 10,
        stride: int = 2,
        pool: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
        self.num_classes, self.pool = num_classes, pool
        self.stages = nn.ModuleList(
            _stage(before, after, 1 if number == 0 else stride, norm)
            for number, (before, after) in enumerate(pairwise((in_channels, *widths)))
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.forward_head(x)

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last stage's output, and those of the stages in `indices` (None: all), as timm's models give them."""
        features = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if indices is None or number in indices:
                features.append(x)
        return x, features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last stage's output; with `pre_logits` that output pooled, which the classifier reads."""
        pooled = x.mean((-2, -1)) if self.pool == "mean" else x.amax((-2, -1))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.head


class SmallMLP(nn.Sequential):
    """Linear layers with ReLU on flattened images; it has no stages.

    Args:
        in_features: pixels times channels of an image.
        hidden: widths of the hidden layers.
        num_classes: of the task.
    """

    def __init__(self, in_features: int = 64, hidden: Sequence[int] = (32,), num_classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise((in_features, *hidden)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear((in_features, *hidden)[-1], num_classes))
        self.num_classes = num_classes


def _stage(before: int, after: int, stride: int, norm: str) -> nn.Sequential:
    norms = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(1, channels), "none": nn.Identity}
    if norm not in norms:
        raise ValueError(f"norm must be one of {sorted(norms)}, got {norm!r}")
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=norm == "none")
    return nn.Sequential(convolution, norms[norm](after), nn.ReLU())
