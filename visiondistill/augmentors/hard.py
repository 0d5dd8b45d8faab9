"""Images on which teacher and student disagree, found by a network while the student learns on them.

After Nix, Burg, Sinz: Hard Augmentations for Robust Distillation, arXiv 2305.14890. This is a
reconstruction: no code was released, and beyond what the abstract says (an augmentation model,
learned online, makes images on which the two disagree; families from spatial transformations on)
the objective, the switch and the numbers are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visiondistill.augmentors.edits import Edit
from visiondistill.augmentors.mix import soft_target
from visiondistill.engine.across import mean_across
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Carry, Terms, Turn
from visiondistill.engine.rng import Draw
from visiondistill.losses.common import positive_temperature
from visiondistill.losses.kd import kd_loss
from visiondistill.models.network import Network
from visiondistill.parts import Part
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, View

TRAIN = "train"
CLEAN, HARD = slice(0, None, 2), slice(1, None, 2)
"""Rows that stay as they are, and rows that are edited; the partner of row 2k + 1 is row 2k."""


class Hard(Part):
    """Edits every second image of the batch; a turn of its own makes the edits harder.

    With D = `T^2 KL(teacher || student)` of the student's own classifier, x the image and x' the
    edited one, the edit's turn descends on `-D(x') + stability * KL(teacher(x) || teacher(x')) - diversity`, through
    both networks, which stay as they are (BatchNorm with running statistics). It declines while D
    on edited images is above `upper` times its running mean on clean ones, until it is below
    `lower` times it. The student's terms see edited images like any others: with their labels, which
    an edit that mixes turns into shares, as `Mix` does.

    The edit is the player `augmentor`: Adam with 1e-4 and no weight decay is a good start. Its bounds
    must leave the classes recognisable, and so must `stability` for edits that could fool the teacher.
    Micro-batches must be even.

    Args:
        edit: `Affine`, `AffineRange`, `Mask` or another `Edit`.
        temperature: T > 0.
        stability: weight >= 0 of the teacher's own change.
        diversity: weight >= 0 of how much the edit's numbers differ between two draws of its noise, on
            average: what is hardest is found by chance and then left alone, what is varied is covered.
        upper, lower: the switch, 0 < lower <= upper; without `upper` it never pauses.
        warmup: steps without edits.
        every: steps from one turn of the edit to the next.
        momentum: of the running mean, in [0, 1).

    Raises:
        SettingsError: a number outside its range, or a teacher that cannot answer to new images.
    """

    asks_teacher = True
    views = frozenset({"edit"})
    needs = Needs(teacher_logits=True)

    def __init__(
        self,
        edit: Edit,
        temperature: float = 4.0,
        stability: float = 0.0,
        diversity: float = 0.0,
        upper: float | None = 2.0,
        lower: float = 1.2,
        warmup: int = 0,
        every: int = 1,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        upper = math.inf if upper is None else upper
        if not 0 < lower <= upper:
            raise SettingsError(f"need 0 < lower <= upper, got lower={lower} and upper={upper}")
        if not 0 <= stability < math.inf or not 0 <= diversity < math.inf or not 0 <= momentum < 1 or warmup < 0:
            raise SettingsError(
                f"need stability and diversity >= 0, momentum in [0, 1) and warmup >= 0, "
                f"got {stability}, {diversity}, {momentum} and {warmup}"
            )
        self.temperature = positive_temperature(temperature)
        self.stability, self.diversity, self.upper, self.lower = stability, diversity, upper, lower
        self.warmup, self.every, self.momentum = warmup, every, momentum
        self.players[""] = edit
        self.soft_labels = edit.mixes
        self.register_buffer("clean", torch.tensor(-1.0))
        self.register_buffer("searching", torch.tensor(1.0))

    @property
    def edit(self) -> Edit:
        return self.players[""]

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        if not teacher.frozen and not teacher.players:
            raise SettingsError(
                f"hard augmentations ask the teacher about new images, and {type(teacher).__name__} has no network"
            )
        if self.soft_labels and student.num_classes is None:
            raise SettingsError("the student does not say how many classes it tells apart: give it num_classes")
        self._networks, self._classes = (student, teacher), student.num_classes

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("augmentor", self.search_loss, moves=("",), every=self.every, start=self.warmup),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        data, image, draws = batch[TRAIN], batch[TRAIN]["image"], draw.of(TRAIN)
        if len(image) % 2:
            raise SettingsError(
                f"every second row of a micro-batch is edited, and it has {len(image)}: choose batch_size so that "
                f"batch_size / (processes x grad_accum_steps) is even"
            )
        own, partner = image[HARD], image[CLEAN]
        hard, share = own, torch.ones(len(own), dtype=image.dtype, device=image.device)
        if draw.step >= self.warmup:
            hard, share = self.edited(own, self.edit.noise(image, draws, "hard.student")[HARD], partner)
        data = data | {"image": torch.stack([partner, hard], 1).flatten(0, 1)}
        if self.soft_labels:
            data = self._mixed(data, share)
        given = {"image": own, "partner": partner, "noise": self.edit.noise(image, draws, "hard.search")[HARD]}
        if self.diversity:
            given["other_noise"] = self.edit.noise(image, draws, "hard.other")[HARD]
        return batch | {TRAIN: data, "hard": given}

    def edited(self, image: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """The edit's answer, in the images' own precision: autocast would round pixels."""
        with torch.autocast(image.device.type, enabled=False):
            return self.edit(image, noise, partner)

    def search_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        """What the edit descends on."""
        student, teacher = self._networks
        given = batch["hard"]
        hard, _ = self.edited(given["image"], given["noise"], given["partner"])
        answer = teacher.targets({"image": hard})["logits"]
        terms = {"disagreement": -kd_loss(student(hard).logits, answer, self.temperature)}
        if self.stability:
            with torch.no_grad():
                before = teacher.targets({"image": given["image"]})["logits"]
            terms["stability"] = self.stability * kd_loss(answer, before, self.temperature)
        if self.diversity:
            with torch.autocast(hard.device.type, enabled=False):
                one, other = (
                    self.edit.numbers(given["image"], given[noise], given["partner"])
                    for noise in ("noise", "other_noise")
                )
            terms["diversity"] = -self.diversity * (one - other).abs().mean()
        return terms, {"skip": 0.5 - self.searching}

    def observe(self, view: View) -> Carry:
        each = kd_loss(view.logits.detach(), view.teacher_logits, self.temperature, reduction="none")
        return {"clean": mean_across(each[CLEAN].mean()), "hard": mean_across(each[HARD].mean())}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor]:
        if "clean" not in carry:
            return {}
        now, hard = carry["clean"].to(self.clean.dtype), carry["hard"].to(self.clean.dtype)
        clean = torch.where(self.clean < 0, now, torch.lerp(now, self.clean, self.momentum))
        below = torch.where(self.searching > 0, hard <= self.upper * clean, hard < self.lower * clean)
        return {"clean": clean, "searching": below.to(self.searching.dtype)}

    def _mixed(self, data: Batch, share: Tensor) -> Batch:
        label = data["label"]
        own, other = label[HARD], label[CLEAN]
        hard = soft_target(own, self._classes, share) + soft_target(other, self._classes, 1 - share)
        target = torch.stack([soft_target(other, self._classes, torch.ones_like(share)), hard], 1).flatten(0, 1)
        return {name: value for name, value in data.items() if name != "label"} | {"target": target}
