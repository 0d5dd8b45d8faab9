"""Temporally adaptive interpolation; see `losses.taid_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from visiondistill.engine.across import mean_across
from visiondistill.engine.method import Batch, Carry
from visiondistill.engine.rng import Draw
from visiondistill.losses.taid import taid_loss
from visiondistill.terms.base import Needs, Term, View


class TAID(Term):
    """A target that moves from the student's own answer to the teacher's, faster while the loss falls.

    After each update, with J the batch's loss: `m <- beta m + (1 - beta) (J_before - J) / J_before`
    and `t <- t + alpha sigmoid(m) (1 - t)`, but at least on the straight line from `start` to `end`
    over `steps` updates, and at most `end`. Once per update, over all processes and
    micro-batches; the released code moves t at each micro-batch.

    Args:
        steps: updates after which t has reached `end`.
        start, end: of the teacher's share t, in [0, 1].
        alpha, beta: step size and momentum of the adaptive part.

    Raises:
        ValueError: a share outside [0, 1], start > end, or steps < 1.
    """

    def __init__(
        self, steps: int, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99
    ) -> None:
        super().__init__()
        if not 0 <= start <= end <= 1 or steps < 1:
            raise ValueError(f"need 0 <= start <= end <= 1 and steps >= 1, got {start}, {end} and {steps}")
        self.steps, self.start, self.end, self.alpha, self.beta = steps, start, end, alpha, beta
        self.needs = Needs(teacher_logits=True)
        self.register_buffer("share", torch.tensor(start))
        self.register_buffer("momentum", torch.tensor(0.0))
        self.register_buffer("loss_before", torch.tensor(-1.0))

    @property
    def key(self) -> str:
        """Where a batch has the line's share; of the settings, so that terms with others do not write over it."""
        return f"taid.{self.start}.{self.end}.{self.steps}"

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        line = self.start + (self.end - self.start) * draw.step / self.steps
        return batch | {self.key: torch.full((), line, dtype=torch.float32, device=draw.device)}

    def forward(self, view: View) -> Tensor:
        values = taid_loss(view.logits, view.teacher_logits, self.share, reduction="none")
        view.carry |= {"loss": mean_across(values.detach().mean()), "line": view.batch[self.key]}
        return values

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor]:
        if "loss" not in carry:
            return {}
        fall = (self.loss_before - carry["loss"]) / (self.loss_before + 1e-15)
        momentum = self.beta * self.momentum + (1 - self.beta) * fall
        adaptive = self.share + self.alpha * momentum.sigmoid() * (1 - self.share)
        share = torch.maximum(adaptive, carry["line"]).clamp(max=self.end)
        # The first update has nothing to compare with.
        first = self.loss_before < 0
        return {
            "share": torch.where(first, self.share, share),
            "momentum": torch.where(first, self.momentum, momentum),
            "loss_before": carry["loss"],
        }
