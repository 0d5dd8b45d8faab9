"""The two classifiers of a student that is built for distillation.

Touvron, Cord, Douze, Massa, Sablayrolles, Jegou: Training data-efficient image transformers and distillation
through attention, ICML 2021, arXiv 2012.12877; with `HardLabel` on the second one the loss is equation 3.
"""

from __future__ import annotations

from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.heads.base import Heads
from visiondistill.models.network import Network, Outputs


class DistilledHead(Heads):
    """The student's own two classifiers: "main", of its class token, and "distilled", of its distillation token.

    Terms choose theirs by `head`, so that neither classifier learns from the other's terms; the trunk
    learns from both. Outside the terms, and exported, the student answers with the mean of both, as its
    class does.

    It fits every timm model with `set_distilled_training`: `deit_*_distilled_*`, `pit_*_distilled_*`,
    and those whose two classifiers read one embedding, such as LeViT and EfficientFormer.
    """

    names = ("main", "distilled")

    def connect(self, student: Network, teacher: object) -> None:
        self._deciding = tuple(part for part in student.model.modules() if hasattr(part, "distilled_training"))
        if not self._deciding:
            raise _alone(student)

    def forward(
        self, student: Network, images: Tensor, stages: tuple[int, ...], embedding: bool
    ) -> tuple[dict[str, Tensor], Outputs]:
        modes = [(part, part.training, part.distilled_training) for part in self._deciding]
        # Only here, since everyone else expects one answer; not by `train`, which would reach the layers:
        # a frozen trunk, or a turn that trains another player, has them in eval mode.
        for part in self._deciding:
            part.training = part.distilled_training = True
        try:
            outputs = student(images, stages, embedding)
        finally:
            for part, training, distilled in modes:
                part.training, part.distilled_training = training, distilled
        if not isinstance(outputs.logits, tuple):
            raise _alone(student)
        main, distilled = outputs.logits
        return {"main": main, "distilled": distilled}, outputs._replace(logits=main)


def _alone(student: Network) -> SettingsError:
    return SettingsError(
        f"heads: {type(student.model).__name__} has no second classifier of its own. Choose a student that has, such "
        f"as timm's deit_tiny_distilled_patch16_224, or heads that bring one: visiondistill.heads.DualHead"
    )
