"""Weights of teacher and label by the geometry between student, teacher and truth, learned on validation images.

Hu, Wu, Li, Ma, Chen, Yan, Wang, Liu: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge
Distillation, ICLR 2024, arXiv 2312.15112 (TGeo-KD). The features are those of the released code (option 3 of its
`state_design`). Its training is not: there the fusion net is evaluated without gradients and stays as
it was initialised, cross-entropies are of probabilities taken for logits, and class means are of test images. Here
the net learns as the paper says, by one virtual step of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, one_hot

from visiondistill.engine.across import mean_across
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Carry, Stream, Terms, Turn
from visiondistill.losses.common import lift
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.teachers.means import class_means
from visiondistill.terms.base import Needs, View
from visiondistill.weighting.fixed import Fixed, Ramp

EDGES = ("st", "sg", "tg")
"""Student to teacher, student to ground truth, teacher to ground truth."""
STUDENT = "players.student."


class Trilateral(Fixed):
    """The teacher's term times alpha plus the label's times 1 - alpha, with an alpha for each image.

    A small net sees the probabilities of student S, teacher T and truth G, the teacher's mean over
    the image's class, and their squared differences; alpha is the sigmoid of its answer, 1/2 at
    first. In a turn of its own it lowers the cross-entropy on the stream "val" after one virtual
    SGD step of the student on the training batch: the whole student's turn counts there, with its
    heads, regressors, other terms and augmented images; running statistics stay, dropout is off.
    The student sees alpha as a constant, and the net sees S so.

    Class means are of training images alone, from one pass of the teacher; a class without images
    has a uniform one. An image without a label has G = 0 and a uniform mean. As validation images
    train the net, the student's accuracy on them is no unbiased measure.

    The net is the player `weighting_net`: Adam with 1e-3 and no weight decay is a good start.

    Args:
        teacher, truth: the two terms; both have a value per image.
        weights: of the other terms, as of `Fixed`.
        every: steps from one update of the net to the next.
        virtual_lr: rate of the virtual step, > 0. The net's gradient grows in proportion to a small one, which
            Adam evens out until it is near its epsilon. Too large a step overshoots, and the net learns about a
            student that there never is: `fusion/val`, the loss after the step, is then far above the student's
            own on these images, `val/nll` of an evaluation.
        hidden: widths of the net's hidden layers.
        edges: squared differences that it sees, of "st", "sg" and "tg".
        inter_sample: whether it sees class means, and the squared differences to them.

    Raises:
        ValueError: an edge that there is not, or a rate that is not positive.
        SettingsError: `teacher` or `truth` is no term, or has a weight; the teacher learns.
    """

    needs = Needs(label=True, soft_label=True, teacher_logits=True)
    reads = ("val",)

    def __init__(
        self,
        teacher: str = "kd",
        truth: str = "ce",
        weights: Mapping[str, float | Ramp] | None = None,
        every: int = 1,
        virtual_lr: float = 1e-3,
        hidden: Sequence[int] = (32, 16),
        edges: Sequence[str] = EDGES,
        inter_sample: bool = True,
    ) -> None:
        super().__init__(weights)
        if not set(edges) <= set(EDGES):
            raise ValueError(f"edges must be of {EDGES}, got {list(edges)}")
        if not virtual_lr > 0:
            raise ValueError(f"virtual_lr must be > 0, got {virtual_lr}")
        self.teacher, self.truth = teacher, truth
        self.every, self.virtual_lr, self.hidden = every, virtual_lr, tuple(hidden)
        self.edges, self.inter_sample = frozenset(edges), inter_sample

    def active(self, terms: Sequence[str]) -> list[str]:
        own = (self.teacher, self.truth)
        missing = sorted(set(own) - set(terms))
        if missing or self.teacher == self.truth:
            raise SettingsError(f"alpha is between two terms, {list(own)}; the terms are {sorted(terms)}")
        if set(own) & set(self.weights):
            raise SettingsError(f"{list(own)} are weighted by alpha and 1 - alpha: give weights for other terms only")
        return super().active(terms)

    def by_row(self, term: str) -> bool:
        return term in (self.teacher, self.truth)

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        if teacher.online:
            raise SettingsError("class means are of a teacher that stays as it is, not of one that learns")
        if student.num_classes is None:
            raise SettingsError("the student does not say how many classes it tells apart: give it num_classes")
        classes = student.num_classes
        points = 3 + self.inter_sample
        self.players["net"] = fusion_net((points + len(self.edges) + 2 * self.inter_sample) * classes, self.hidden)
        self.register_buffer("class_means", torch.full((classes, classes), 1 / classes))
        self._teacher = (teacher,)

    def bind(self, side: nn.Module) -> None:
        self._side = (side,)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("fusion", self.fusion_loss, moves=("net",), every=self.every, accumulate=False),)

    def setup(self, streams: dict[str, Stream]) -> None:
        (teacher,) = self._teacher
        data = streams["train"].data
        means = class_means(teacher, data, lambda targets: lift(targets["logits"]).softmax(1), self.class_means)
        self.class_means.copy_(means)

    def forward(self, values: dict[str, Tensor], view: View) -> Terms:
        return self._weighted(values, view, self.shares(view).detach())

    def shares(self, view: View) -> Tensor:
        """Alpha, the teacher's share in each image's loss: `[B]`, in (0, 1)."""
        return self.players["net"](self.geometry(view)).sigmoid().squeeze(1)

    def geometry(self, view: View) -> Tensor:
        """What the net sees: `[B, 9 K]`, less without some edges or class means."""
        student = lift(view.logits.detach()).softmax(1)
        teacher = lift(view.teacher_logits).softmax(1).to(student.dtype)
        truth = _truth(view, student)
        # What of the truth is missing is spread over all classes.
        means = truth @ self.class_means.to(student.dtype) + (1 - truth.sum(1, keepdim=True)) / truth.shape[1]
        seen = {
            "s": student,
            "t": teacher,
            "g": truth,
            "m": means,
            "ms": (means - student).square(),
            "sg": (truth - student).square(),
            "st": (teacher - student).square(),
            "tg": (teacher - truth).square(),
            "mg": (means - truth).square(),
        }
        left_out = set(EDGES) - self.edges | (set() if self.inter_sample else {"m", "ms", "mg"})
        return torch.cat([part for name, part in seen.items() if name not in left_out], 1)

    def fusion_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        """The student's loss on validation images after its virtual step, a function of the net."""
        (side,) = self._side
        # The validation loss reads no other player, so that only these need to step.
        student = {name: p.detach() for name, p in side.named_parameters() if name.startswith(STUDENT)}
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            step = grad(self._student_loss)(student, batch)
        # The mean over processes is the step of the whole batch; validation is not linear in it.
        moved = {name: p - self.virtual_lr * mean_across(step[name]) for name, p in student.items()}
        moved = {name.removeprefix(STUDENT): p for name, p in moved.items()}
        logits = functional_call(side.players["student"], moved, (batch["val"]["image"],)).logits
        label = batch["val"]["label"]
        return {"val": cross_entropy(lift(logits), label, ignore_index=-1, reduction="sum") / len(label)}, {}

    def _student_loss(self, student: dict[str, Tensor], batch: Batch) -> Tensor:
        (side,) = self._side
        values, view = functional_call(side, student, (batch,))
        return torch.stack(list(self._weighted(values, view, self.shares(view)).values())).sum()

    def _weighted(self, values: dict[str, Tensor], view: View, share: Tensor) -> Terms:
        shares = {self.teacher: share, self.truth: 1 - share}
        others = super().forward({name: value for name, value in values.items() if name not in shares}, view)
        return others | {name: (alpha * values[name]).mean() for name, alpha in shares.items()}


def fusion_net(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with LeakyReLU between them and one output, which is 0 at first."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.LeakyReLU(0.01)]
        inputs = width
    last = nn.Linear(inputs, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def _truth(view: View, like: Tensor) -> Tensor:
    """`[B, K]`: mixed labels as they are, one-hot others, 0 where there is no label."""
    if view.target is not None:
        return view.target.to(like.dtype)
    known = view.batch["train"]["label"] >= 0
    return one_hot(view.label, like.shape[1]).to(like.dtype) * known[:, None]
