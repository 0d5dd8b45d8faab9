"""Two classifiers on one trunk.

Yang, Zong, Huang, Feng, An: Dual-Head Knowledge Distillation, KDD 2025, arXiv 2411.08937. Mixing both at
inference: Kang, Lee, Jang, Hwang: Simple yet Effective Semi-supervised Knowledge Distillation from Vision-Language
Models via Dual-Head Optimization (DHO), arXiv 2505.07675, equation 8.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from visiondistill.engine.errors import SettingsError
from visiondistill.heads.base import Heads
from visiondistill.models.network import Network, Outputs


class DualHead(Heads):
    """The student's own classifier, "main", and a second one, "second", on the same embedding.

    The second is the player `heads_second`. Terms choose theirs by `head`; the trunk learns from both.

    Args:
        hidden: width of a hidden layer of the second classifier (linear, dropout, batch norm, ReLU,
            linear, in the released order); None for a linear one.
        dropout: of the hidden layer, in [0, 1).
        inference: "main" drops the second classifier at export; "both" exports their mixture.
        share: of the main classifier's probabilities in the mixture, in [0, 1].
        temperature: > 0, divides the second classifier's logits in the mixture.

    Raises:
        ValueError: a number outside its range.
    """

    names = ("main", "second")

    def __init__(
        self,
        hidden: int | None = 200,
        dropout: float = 0.1,
        inference: Literal["main", "both"] = "main",
        share: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if inference not in ("main", "both"):
            raise ValueError(f"inference must be 'main' or 'both', got {inference!r}")
        if not 0 <= share <= 1 or not temperature > 0 or not 0 <= dropout < 1:
            raise ValueError(f"need share in [0, 1], temperature > 0, dropout in [0, 1): {share, temperature, dropout}")
        self.hidden, self.dropout, self.inference = hidden, dropout, inference
        self.share, self.temperature = share, temperature

    def connect(self, student: Network, teacher: object) -> None:
        if student.num_classes is None:
            raise SettingsError("the student does not say how many classes it tells apart: give it num_classes")
        width, classes = student.embedding_size(), student.num_classes
        if self.hidden is None:
            second: nn.Module = nn.Linear(width, classes)
        else:
            second = nn.Sequential(
                nn.Linear(width, self.hidden),
                nn.Dropout(self.dropout),
                nn.BatchNorm1d(self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, classes),
            )
        self.players["second"] = second
        self._mixture = (TwoHeaded(student, second, self.share, self.temperature),)

    def forward(
        self, student: Network, images: Tensor, stages: tuple[int, ...], embedding: bool
    ) -> tuple[dict[str, Tensor], Outputs]:
        outputs = student(images, stages, embedding=True)
        return {"main": outputs.logits, "second": self.players["second"](outputs.embedding)}, outputs

    def product(self, student: Network) -> nn.Module:
        return student if self.inference == "main" else self._mixture[0]


class TwoHeaded(nn.Module):
    """A classifier whose probabilities are `share softmax(main) + (1 - share) softmax(second / temperature)`.

    Its logits are the logarithms of these. It takes pixels in [0, 1], as the network does.
    """

    def __init__(self, network: Network, second: nn.Module, share: float, temperature: float) -> None:
        super().__init__()
        self.network, self.second, self.share, self.temperature = network, second, share, temperature
        self.num_classes, self.input_size = network.num_classes, network.input_size

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(images, embedding=True)
        main = outputs.logits.float().softmax(-1)
        second = (self.second(outputs.embedding).float() / self.temperature).softmax(-1)
        return (self.share * main + (1 - self.share) * second).clamp(min=1e-30).log()
