"""ShuffleNets for CIFAR: Zhang et al., CVPR 2018 (V1) and Ma et al., ECCV 2018 (V2), with a 1x1 stem for 32 pixels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from visiondistill.models.cifar.staged import StagedNet, conv1x1, conv3x3, shuffle_channels

STEM = 24


class CifarShuffleNetV1(StagedNet):
    """Three groups as wide as the paper's 3-group net; the first block of each halves the resolution.

    Args:
        num_classes, in_chans: of the task and the images.
    """

    classifier_name: ClassVar[str] = "linear"

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        widths, blocks, groups = (240, 480, 960), (4, 8, 4), 3
        self.conv1, self.bn1 = conv1x1(in_chans, STEM), nn.BatchNorm2d(STEM)
        before = STEM
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            units = [_UnitV1(before, width, 2, groups)] + [_UnitV1(width, width, 1, groups) for _ in range(count - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*units))
            before = width
        self.finish(num_classes, widths[-1], (STEM, *widths), (1, 2, 4, 8))

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        maps = [relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps


class CifarShuffleNetV2(StagedNet):
    """Three groups as wide as the paper's 1x net, then a 1x1 convolution to 1024 channels.

    Args:
        num_classes, in_chans: of the task and the images.
    """

    classifier_name: ClassVar[str] = "linear"

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        widths, blocks, hidden = (116, 232, 464), (3, 7, 3), 1024
        self.conv1, self.bn1 = conv1x1(in_chans, STEM), nn.BatchNorm2d(STEM)
        before = STEM
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            units = [_DownUnitV2(before, width), *(_UnitV2(width) for _ in range(count))]
            setattr(self, f"layer{number}", nn.Sequential(*units))
            before = width
        self.conv2, self.bn2 = conv1x1(before, hidden), nn.BatchNorm2d(hidden)
        self.finish(num_classes, hidden, (STEM, *widths), (1, 2, 4, 8))

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        maps = [relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps

    def neck(self, x: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(x)))


class _UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; a halving unit appends its pooled input."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        new = after - before if stride == 2 else after
        middle = new // 4
        # The stem's channels are too few to be split.
        self.groups = 1 if before == STEM else groups
        self.stride = stride
        self.conv1, self.bn1 = conv1x1(before, middle, groups=self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv3x3(middle, middle, stride, groups=middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv1x1(middle, new, groups=groups), nn.BatchNorm2d(new)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle_channels(relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return relu(torch.cat([out, avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return relu(out + x)


class _UnitV2(nn.Module):
    """Half of the channels pass, the other half go through 1x1, depthwise 3x3, 1x1; then a shuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv3x3(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(out)))))
        out = relu(self.bn3(self.conv3(out)))
        return shuffle_channels(torch.cat([passed, out], 1), 2)


class _DownUnitV2(nn.Module):
    """Both branches read the whole input at half the resolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        half = after // 2
        self.conv1, self.bn1 = conv3x3(before, before, 2, groups=before), nn.BatchNorm2d(before)
        self.conv2, self.bn2 = conv1x1(before, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(before, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv3x3(half, half, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(relu(self.bn3(self.conv3(x)))))
        right = relu(self.bn5(self.conv5(right)))
        return shuffle_channels(torch.cat([left, right], 1), 2)
