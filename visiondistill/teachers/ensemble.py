"""Several networks that answer as one.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2: the
soft targets of an ensemble are the arithmetic or geometric mean of its members' distributions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from visiondistill.models.network import as_network


class Ensemble(nn.Module):
    """The mean of several classifiers of the same images, one pass each, each with its own pixels.

    A classifier of pixels in [0, 1] itself: it serves as teacher, can be evaluated, and has no features.

    Args:
        networks: by name; `Network`s, or classifiers of pixels in [0, 1].
        mean: "probabilities": of `softmax(logits / temperature)`, the arithmetic mean; "logits": their
            plain mean, whose softmax is the geometric mean of the probabilities up to a factor.
        temperature: at which probabilities are averaged. With the one that the term uses, its targets
            are exactly the mean of the members' softened probabilities.

    Raises:
        ValueError: no network, unequal class counts, another `mean`, or a temperature that is not positive.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        mean: Literal["probabilities", "logits"] = "probabilities",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not networks:
            raise ValueError("an ensemble needs at least one network")
        if mean not in ("probabilities", "logits"):
            raise ValueError(f"mean must be 'probabilities' or 'logits', got {mean!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a number > 0, got {temperature}")
        self.networks = nn.ModuleDict({name: as_network(network) for name, network in networks.items()})
        self.mean, self.temperature = mean, temperature
        self.num_classes = _common_classes(self.networks)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` in [0, 1] to logits `[B, K]`, fp32 or finer.

        For "probabilities": T log of the mean of softmax(z / T), so that softmax(logits / T) is the mean.
        """
        answers = [network(images).logits for network in self.networks.values()]
        logits = torch.stack([answer.to(torch.promote_types(answer.dtype, torch.float32)) for answer in answers])
        if self.mean == "logits":
            return logits.mean(0)
        softened = (logits / self.temperature).log_softmax(-1)
        return self.temperature * (softened.logsumexp(0) - math.log(len(answers)))


def _common_classes(networks: nn.ModuleDict) -> int | None:
    counts = {name: network.num_classes for name, network in networks.items() if network.num_classes is not None}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(f"the networks of an ensemble must tell the same classes apart, got {told}")
    return next(iter(counts.values()), None)
