"""Wide ResNets for CIFAR: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from visiondistill.models.cifar.staged import StagedNet, conv1x1, conv3x3


class CifarWideResNet(StagedNet):
    """Stem and three stages of pre-activation blocks, then a last BatchNorm and ReLU.

    The last stage's map is the one before that BatchNorm; the stem's too has no activation yet.

    Args:
        depth: 6n + 4, with n blocks a stage.
        widen: factor on the stages' 16, 32 and 64 channels.
        num_classes, in_chans: of the task and the images.

    Raises:
        ValueError: a depth that is not 6n + 4.
    """

    def __init__(self, depth: int, widen: int, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 40), got {depth}")
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv3x3(in_chans, widths[0])
        self.block1 = _Stage(widths[0], widths[1], 1, blocks)
        self.block2 = _Stage(widths[1], widths[2], 2, blocks)
        self.block3 = _Stage(widths[2], widths[3], 2, blocks)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.finish(num_classes, widths[3], widths, (1, 1, 2, 4))

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        maps = [self.conv1(x)]
        for stage in (self.block1, self.block2, self.block3):
            maps.append(stage(maps[-1]))
        return maps

    def neck(self, x: Tensor) -> Tensor:
        return relu(self.bn1(x))


class _Stage(nn.Module):
    def __init__(self, before: int, after: int, stride: int, blocks: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(_Block(before, after, stride), *(_Block(after, after, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv3x3(before, after, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), conv3x3(after, after)
        # A projection reads the activated input, an identity shortcut the raw one.
        self.convShortcut = None if before == after else conv1x1(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        out = self.conv2(relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))
