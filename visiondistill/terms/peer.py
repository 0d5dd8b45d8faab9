"""Terms with the roles exchanged, as in mutual learning.

Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018, arXiv 1706.00384, section 3.1.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Carry
from visiondistill.engine.rng import Draw
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Term, View


class Peer(Term):
    """A term that teaches an `Online` teacher what the student answers.

    The term sees the teacher's logits as the learner's and the student's as the teacher's, without
    gradients; mutual learning is `ce`, `kd` and each of them once more as a peer.

    Args:
        term: reads labels and logits only.

    Raises:
        SettingsError: the term reads features or another head.
    """

    def __init__(self, term: Term) -> None:
        super().__init__()
        needs = term.needs
        if needs.student_stages or needs.teacher_stages or needs.student_embedding or needs.teacher_embedding:
            raise SettingsError(f"{type(term).__name__} reads features: a peer reads labels and logits only")
        if needs.head != "main":
            raise SettingsError(f"{type(term).__name__} reads the head '{needs.head}': a peer has the main one only")
        self.needs = replace(needs, teacher_logits=True, peer=True)
        self.term = term

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        if teacher is None or not teacher.online:
            raise SettingsError(f"a peer ({type(self.term).__name__}) needs a teacher that learns: teachers.Online")

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return self.term.prepare(batch, draw, due)

    def forward(self, view: View) -> Tensor:
        return self.term(view)

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        return {f"term.{state}": value for state, value in self.term.after(turn, carry).items()}
