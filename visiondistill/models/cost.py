"""What a network costs: parameters, operations, and what a distillation step costs beside a plain one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visiondistill.models.network import as_network, evaluating


def count_parameters(network: nn.Module, trainable: bool = False) -> int:
    """Parameters of a module, each once; with `trainable` only those that require gradients."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trainable)


def count_flops(network: nn.Module, image_size: tuple[int, int, int] | None = None) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add as two.

    Matrix products, convolutions and attention are counted; elementwise work and norms are not.

    Args:
        network: a `Network`, or any classifier of pixels in [0, 1].
        image_size: `(C, H, W)` of the image that it is given; by default the network's own input size.

    Raises:
        ValueError: no size is given and the network has none of its own.
    """
    network = as_network(network)
    size = image_size or network.input_size
    if size is None:
        raise ValueError(
            f"the operations of {type(network.model).__name__} depend on the image size: give image_size (C, H, W)"
        )
    images = torch.zeros(1, *size, device=network.scale.device)
    counter = FlopCounterMode(display=False)
    # Fused attention has no formula on the CPU; the plain kernel does the same work in counted products.
    with evaluating(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(images)
    return counter.get_total_flops()


def ideal_step_cost(teacher_flops: int, student_flops: int) -> float:
    """A distillation step over a step without a teacher, if only operations counted: 1 + F_t / (3 F_s).

    The student's backward pass counts as two forward passes.
    """
    return 1 + teacher_flops / (3 * student_flops)
