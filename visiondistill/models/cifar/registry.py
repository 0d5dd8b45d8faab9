"""The names under which timm makes the CIFAR networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visiondistill.models.cifar.mobilenet import CifarMobileNetV2
from visiondistill.models.cifar.resnet import CifarResNet, CifarResNetA
from visiondistill.models.cifar.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from visiondistill.models.cifar.staged import StagedNet
from visiondistill.models.cifar.vgg import CifarVGG
from visiondistill.models.cifar.wrn import CifarWideResNet

Maker = tuple[type[StagedNet], dict[str, Any]]

CIFAR_STATISTICS = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
"""CIFAR-100's, per channel in [0, 1], as the distillation literature normalises."""
IMAGENET_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What the published weights of the option-A nets were trained with."""

WIDER = (32, 64, 128, 256)
NETS: dict[str, Maker] = {
    **{f"cifar_resnet{d}": (CifarResNet, {"depth": d}) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{d}x4": (CifarResNet, {"depth": d, "widths": WIDER}) for d in (8, 32)},
    **{f"cifar_resnet{d}a": (CifarResNetA, {"depth": d, "num_classes": 10}) for d in (20, 32, 44, 56, 110)},
    **{f"cifar_wrn_{d}_{w}": (CifarWideResNet, {"depth": d, "widen": w}) for d in (16, 40) for w in (1, 2)},
    "cifar_vgg8_bn": (CifarVGG, {"convolutions": (1, 1, 1, 1, 1)}),
    "cifar_vgg13_bn": (CifarVGG, {"convolutions": (2, 2, 2, 2, 2)}),
    "cifar_mobilenetv2_half": (CifarMobileNetV2, {"width": 0.5}),
    "cifar_shufflenetv1": (CifarShuffleNetV1, {}),
    "cifar_shufflenetv2": (CifarShuffleNetV2, {}),
}

default_cfgs: dict[str, Any] = {}
"""timm looks in a model's module for its configuration; `register` fills it."""


def names() -> list[str]:
    """Every `cifar_<name>`."""
    return list(NETS)


def register() -> None:
    """Make the CIFAR networks known to timm; calling it again does nothing.

    `visiondistill.models.Timm` does it by itself; call it before `timm.create_model("cifar_resnet20")`.
    """
    from timm.models import generate_default_cfgs, register_model

    if default_cfgs:
        return
    default_cfgs.update(generate_default_cfgs({name: _configuration(name) for name in NETS}))
    for name in NETS:
        register_model(_entry(name))


def _configuration(name: str) -> dict[str, Any]:
    kind, arguments = NETS[name]
    statistics = IMAGENET_STATISTICS if kind is CifarResNetA else CIFAR_STATISTICS
    first = {CifarMobileNetV2: "conv1.0", CifarVGG: "block0.0"}.get(kind, "conv1")
    return {
        **statistics,
        "num_classes": arguments.get("num_classes", 100),
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": first,
        "classifier": kind.classifier_name,
    }


def _entry(name: str) -> Callable[..., StagedNet]:
    def make(pretrained: bool = False, **arguments: Any) -> StagedNet:
        from timm.models import build_model_with_cfg

        kind, own = NETS[name]
        return build_model_with_cfg(kind, name, pretrained, **(own | arguments))

    # timm registers a function under its name, in its module.
    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}: a {NETS[name][0].__name__}."
    return make
