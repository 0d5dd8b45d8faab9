"""Contrastive representation distillation; see `losses.crd_loss`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from visiondistill.engine.across import gather_across, mean_across
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Carry, Stream
from visiondistill.engine.rng import Draw
from visiondistill.losses.crd import crd_loss
from visiondistill.models.network import Network
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, Term, View

TRAIN = "train"
LARGE = 2**62
"""Of random integers that are divided by a set's size: what is left over is as good as uniform."""


class CRD(Term):
    """Draws the embeddings of one image together, and apart from those of images of other classes.

    Linear layers map both networks' embeddings to unit vectors; they are the players
    `<term>_student_head` and `<term>_teacher_head`, both trained in the student's turn and not
    exported. Two banks hold a vector per training image. Each side is compared with the other
    side's bank: its own image and m others, drawn independently from the images of other classes
    that have a label, anew for every row and step (the released code draws without replacement
    where the classes are large enough). After an update the rows of its images become the unit
    vector of `momentum old + (1 - momentum) new`; an image that came twice counts with the mean.

    The normalisers Z are N times the mean over the first batch, and constant from then on. With
    micro-batches each takes its own mean in that one step; what is kept is the mean over all.
    Banks and normalisers are kept with the run: `2 * N * width` numbers.

    Args:
        width: of the vectors.
        negatives: m; at most as many as there are training images.
        temperature: T > 0.
        momentum: in [0, 1).

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self, width: int = 128, negatives: int = 16384, temperature: float = 0.07, momentum: float = 0.5
    ) -> None:
        super().__init__()
        if width < 1 or negatives < 1 or not temperature > 0 or not 0 <= momentum < 1:
            raise ValueError(
                "need width >= 1, negatives >= 1, temperature > 0 and momentum in [0, 1), "
                f"got {width}, {negatives}, {temperature} and {momentum}"
            )
        self.width, self.negatives, self.temperature, self.momentum = width, negatives, temperature, momentum
        self.needs = Needs(label=True, student_embedding=True, teacher_embedding=True)

    def settle(self, student: Network, streams: Mapping[str, Stream]) -> None:
        data = getattr(streams[TRAIN], "data", None)
        if data is None:
            kind = type(streams[TRAIN]).__name__
            raise ValueError(
                f"the banks hold a row for each training image: stream 'train' must have `data`, not {kind}"
            )
        if student.num_classes is None:
            raise ValueError("the student does not say how many classes it tells apart: give it num_classes")
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.zeros(len(data), self.width))
        for name in ("student_normalizer", "teacher_normalizer"):
            self.register_buffer(name, torch.tensor(-1.0))
        # Images sorted by class, those without a label first, and where each class begins.
        self.register_buffer("by_class", torch.zeros(len(data), dtype=torch.int64))
        self.register_buffer("begins", torch.zeros(student.num_classes + 1, dtype=torch.int64))

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        self.players["student_head"] = nn.Linear(student.embedding_size(), self.width)
        self.players["teacher_head"] = nn.Linear(teacher.embedding_size(), self.width)

    @torch.no_grad()
    def setup(self, streams: dict[str, Stream]) -> None:
        label = _labels(streams[TRAIN].data)
        order = label.sort(stable=True)
        if len(label[label >= 0].unique()) < 2:
            raise SettingsError("CRD compares with images of other classes, but all training images are of one class")
        self.by_class.copy_(order.indices)
        self.begins.copy_(torch.searchsorted(order.values, torch.arange(len(self.begins))))
        # Not from the generators of the process: every process must begin with the same banks.
        generator, bound = torch.Generator().manual_seed(0), math.sqrt(3 / self.width)
        for bank in (self.student_bank, self.teacher_bank):
            bank.copy_(torch.empty(bank.shape).uniform_(-bound, bound, generator=generator))

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        count = min(self.negatives, len(self.by_class))
        draws = draw.of(TRAIN).integers(_key(count), 0, LARGE, count)
        label = batch[TRAIN]["label"].clamp(min=0)
        begin, end, first = self.begins[label, None], self.begins[label + 1, None], self.begins[0]
        place = first + draws % (len(self.by_class) - first - (end - begin))
        others = self.by_class[torch.where(place < begin, place, place + end - begin)]
        return batch | {_key(count): others}

    def forward(self, view: View) -> Tensor:
        index = view.batch[TRAIN]["index"]
        compared = torch.cat([index[:, None], view.batch[_key(min(self.negatives, len(self.by_class)))]], 1)
        ours = self._vectors("student_head", view.student_embedding)
        theirs = self._vectors("teacher_head", view.teacher_embedding)
        view.carry |= {
            name: gather_across(rows)
            for name, rows in {"index": index, "student": ours.detach(), "teacher": theirs.detach()}.items()
        }
        sides = {"student": (ours, self.teacher_bank), "teacher": (theirs, self.student_bank)}
        return sum(self._side(name, *side, compared, view.carry) for name, side in sides.items())

    def _vectors(self, head: str, embedding: Tensor) -> Tensor:
        return normalize(self.players[head](embedding).to(self.student_bank.dtype), dim=1)

    def _side(self, name: str, vectors: Tensor, bank: Tensor, compared: Tensor, carry: Carry) -> Tensor:
        # Divided by T, what half precision rounds off would show. All rows first: a gather of whole rows is larger.
        with torch.autocast(vectors.device.type, enabled=False):
            similarity = (vectors @ bank.T).gather(1, compared)
        fresh = len(bank) * mean_across((similarity.detach() / self.temperature).exp().mean())
        kept = getattr(self, f"{name}_normalizer")
        normalizer = torch.where(kept > 0, kept, fresh)
        carry[f"{name}_normalizer"] = normalizer
        return crd_loss(similarity, normalizer, len(bank), self.temperature, reduction="none")

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        if "index" not in carry:
            return {}
        rows = carry["index"]
        same = (rows[:, None] == rows).to(self.student_bank.dtype)
        same = same / same.sum(1, keepdim=True)
        writes: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        for side in ("student", "teacher"):
            old = getattr(self, f"{side}_bank")[rows]
            mixed = self.momentum * old + (1 - self.momentum) * (same @ carry[side])
            writes[f"{side}_bank"] = (rows, normalize(mixed, dim=1))
            kept, fresh = getattr(self, f"{side}_normalizer"), carry[f"{side}_normalizer"]
            writes[f"{side}_normalizer"] = torch.where(kept > 0, kept, fresh)
        return writes


def _key(count: int) -> str:
    """Where a batch has the indices of the others; terms that draw as many see the same ones."""
    return f"crd.{count}"


def _labels(data: object) -> Tensor:
    """Of all images, int64 `[N]` on the CPU, -1 for none."""
    columns = getattr(data, "columns", None)
    label = getattr(data, "targets", None) if columns is None else columns.get("label")
    if label is None:
        raise SettingsError(
            f"CRD needs the labels of all training images at once: {type(data).__name__} has neither a column 'label' "
            f"nor the attribute targets"
        )
    return torch.as_tensor(label).long().cpu()
