"""MobileNetV2 for CIFAR: Sandler et al., CVPR 2018, with strides for 32 pixels as the distillation literature has them.

That literature's variant differs from the paper: every block has its expansion, activations are
plain ReLU, and the second, fourth and sixth groups halve the resolution.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from visiondistill.models.cifar.staged import StagedNet, conv1x1, conv3x3

GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels at full width, blocks, stride of the first block."""
STAGE_ENDS = (1, 2, 4, 6)
"""The groups whose outputs are stages, as the literature reads its features there."""
HIDDEN = 1280


class CifarMobileNetV2(StagedNet):
    """Stem at half the resolution, seven groups of inverted residuals, a 1x1 convolution to 1280 channels.

    Args:
        width: factor on the channels, at most 1.
        num_classes, in_chans: of the task and the images.
    """

    classifier_name: ClassVar[str] = "classifier.0"

    def __init__(self, width: float = 0.5, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        before = int(32 * width)
        self.conv1 = nn.Sequential(conv3x3(in_chans, before, 2), nn.BatchNorm2d(before), nn.ReLU())
        channels, reductions, reduction = [before], [2], 2
        self.blocks = nn.ModuleList()
        for number, (expansion, full, count, stride) in enumerate(GROUPS):
            after = int(full * width)
            first = _InvertedResidual(before, after, stride, expansion)
            self.blocks.append(
                nn.Sequential(first, *(_InvertedResidual(after, after, 1, expansion) for _ in range(count - 1)))
            )
            before, reduction = after, reduction * stride
            if number in STAGE_ENDS:
                channels.append(after)
                reductions.append(reduction)
        self.conv2 = nn.Sequential(conv1x1(before, HIDDEN), nn.BatchNorm2d(HIDDEN), nn.ReLU())
        self.finish(num_classes, HIDDEN, channels, reductions)

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        x = self.conv1(x)
        maps = [x]
        for number, group in enumerate(self.blocks):
            x = group(x)
            if number in STAGE_ENDS:
                maps.append(x)
        return maps

    def neck(self, x: Tensor) -> Tensor:
        return self.conv2(x)


class _InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = before * expansion
        self.conv = nn.Sequential(
            conv1x1(before, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv3x3(hidden, hidden, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv1x1(hidden, after),
            nn.BatchNorm2d(after),
        )
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)
