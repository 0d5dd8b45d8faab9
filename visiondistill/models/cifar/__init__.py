"""The CIFAR networks of the distillation literature, which timm knows as `cifar_<name>` after `register()`."""

from visiondistill.models.cifar.mobilenet import CifarMobileNetV2
from visiondistill.models.cifar.registry import names, register
from visiondistill.models.cifar.resnet import CifarResNet, CifarResNetA
from visiondistill.models.cifar.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from visiondistill.models.cifar.staged import StagedNet
from visiondistill.models.cifar.vgg import CifarVGG
from visiondistill.models.cifar.wrn import CifarWideResNet

__all__ = [
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarResNetA",
    "CifarShuffleNetV1",
    "CifarShuffleNetV2",
    "CifarVGG",
    "CifarWideResNet",
    "StagedNet",
    "names",
    "register",
]
