"""What the CIFAR networks share: features by stage, a head, and the methods that timm's models have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class StagedNet(nn.Module):
    """Stages, the mean over positions, a linear classifier.

    A subclass builds its layers, calls `finish`, and defines `stage_outputs`; where something stands
    between the last stage and the mean it also defines `neck`.

    Attributes:
        classifier_name: of the linear layer in the state dict, as the literature's released code has it.
        num_features: channels that the classifier reads.
        feature_info: `num_chs` and `reduction` of each stage, in the order of `stage_outputs`.
    """

    classifier_name: ClassVar[str] = "fc"
    num_classes: int
    num_features: int
    feature_info: list[dict[str, int]]

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        """`[B, C, H, W]` after the stem and after each stage, in depth order."""
        raise NotImplementedError(f"{type(self).__name__} must define stage_outputs()")

    def neck(self, x: Tensor) -> Tensor:
        """What the classifier's mean is taken of, from the last stage's output."""
        return x

    def finish(self, num_classes: int, num_features: int, channels: Sequence[int], reductions: Sequence[int]) -> None:
        """Make the classifier and draw all weights; the last line of a subclass's constructor."""
        self.num_features = self.head_hidden_size = num_features
        self.feature_info = [{"num_chs": c, "reduction": r} for c, r in zip(channels, reductions, strict=True)]
        self._put_classifier(num_classes)
        self.apply(_draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[B, C, H, W]` to logits `[B, K]`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, num_features, H, W]` before the mean."""
        return self.neck(self.stage_outputs(x)[-1])

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, intermediates_only: bool = False
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """What `forward_features` gives, and the outputs of some stages; with `intermediates_only` these alone.

        Args:
            x: normalised images.
            indices: stages from 0 (the stem), negative from the end; a number n: the last n; None: all.
        """
        maps = self.stage_outputs(x)
        if isinstance(indices, int):
            chosen = maps[-indices:]
        else:
            chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (self.neck(maps[-1]), chosen)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, K]` from features before the mean; with `pre_logits` the mean itself `[B, num_features]`."""
        x = x.mean((-2, -1))
        return x if pre_logits else self.get_classifier()(x)

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes`; 0 puts the identity in its place.

        Raises:
            ValueError: another pooling than the mean is asked for.
        """
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"{type(self).__name__} takes the mean over positions; global_pool={global_pool!r} is not")
        old = next(self.parameters())
        self._put_classifier(num_classes)
        _draw_weights(self.get_classifier())
        self.get_classifier().to(device=old.device, dtype=old.dtype)

    def _put_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        parent, _, name = self.classifier_name.rpartition(".")
        if parent and not hasattr(self, parent):
            setattr(self, parent, nn.Sequential())
        self.get_submodule(parent).add_module(name, layer)


def _draw_weights(module: nn.Module) -> None:
    # He et al., Delving Deep into Rectifiers, ICCV 2015.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        nn.init.zeros_(module.bias)


def conv3x3(before: int, after: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(before: int, after: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1, stride, groups=groups, bias=False)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g goes to place i * groups + g (Zhang et al., ShuffleNet, section 3.1)."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)
