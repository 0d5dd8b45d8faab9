"""VGG nets for CIFAR: Simonyan and Zisserman, ICLR 2015, with BatchNorm and one linear layer, as the field has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from visiondistill.models.cifar.staged import StagedNet

WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(StagedNet):
    """Five stages of 3x3 convolutions; the first three are followed by a halving of the resolution.

    Args:
        convolutions: of each stage.
        num_classes, in_chans: of the task and the images.
    """

    classifier_name: ClassVar[str] = "classifier"

    def __init__(self, convolutions: Sequence[int], num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        before = in_chans
        for number, (count, width) in enumerate(zip(convolutions, WIDTHS, strict=True)):
            setattr(self, f"block{number}", _stage(before, width, count))
            before = width
        self.finish(num_classes, WIDTHS[-1], WIDTHS, (1, 2, 4, 8, 8))

    def stage_outputs(self, x: Tensor) -> list[Tensor]:
        maps = []
        for number in range(len(WIDTHS)):
            x = self.get_submodule(f"block{number}")(x)
            maps.append(x)
            x = max_pool2d(x, 2) if number < 3 else x
        return maps


def _stage(before: int, width: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers)
