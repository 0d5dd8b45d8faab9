"""ResNets for CIFAR: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

The distillation literature uses projection shortcuts (option B) and wider variants; the paper's own
CIFAR nets have shortcuts without parameters (option A), and so have many published weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from visiondistill.models.cifar.staged import StagedNet, conv1x1, conv3x3


class CifarResNet(StagedNet):
    """Stem and three stages of basic blocks; the stages after the first halve the resolution.

    Args:
        depth: 6n + 2, with n blocks a stage.
        widths: channels of the stem and of each stage.
        num_classes, in_chans: of the task and the images.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    projects: ClassVar[bool] = True

    def __init__(
        self, depth: int, widths: Sequence[int] = (16, 16, 32, 64), num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110), got {depth}")
        self.conv1 = conv3x3(in_chans, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(widths[0], widths[1], 1, blocks)
        self.layer2 = self._stage(widths[1], widths[2], 2, blocks)
        self.layer3 = self._stage(widths[2], widths[3], 2, blocks)
        self.finish(num_classes, widths[3], widths, (1, 1, 2, 4))

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        maps = [relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps

    def _stage(self, before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
        first = _BasicBlock(before, after, stride, self.projects)
        return nn.Sequential(first, *(_BasicBlock(after, after, 1, self.projects) for _ in range(blocks - 1)))


class CifarResNetA(CifarResNet):
    """As `CifarResNet`, with shortcuts without parameters: every second pixel, new channels zero, half on each side."""

    classifier_name: ClassVar[str] = "linear"
    projects: ClassVar[bool] = False


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = conv3x3(after, after), nn.BatchNorm2d(after)
        self.stride, self.new_channels = stride, after - before
        changes = stride != 1 or before != after
        self.downsample = None
        if changes and projects:
            self.downsample = nn.Sequential(conv1x1(before, after, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        x = x[..., :: self.stride, :: self.stride]
        half = self.new_channels // 2
        return pad(x, (0, 0, 0, 0, half, self.new_channels - half)) if self.new_channels else x
