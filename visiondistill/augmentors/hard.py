"""Images on which teacher and student disagree, found by a network while the student learns on them.

After Nix, Burg, Sinz: Hard Augmentations for Robust Distillation, arXiv 2305.14890. This is a
reconstruction: no code was released, and beyond what the abstract says (an augmentation model,
learned online, makes images on which the two disagree; families from spatial transformations on)
the objective, the switch and the numbers are ours.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from visiondistill.augmentors.edits import Edit
from visiondistill.augmentors.mix import labels_of, soft_target
from visiondistill.augmentors.pictures import draw_edits
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


class Hard(Part):
    """Edits a share of the batch, by default every second image; a turn of its own makes the edits harder.

    With D = `T^2 KL(teacher || student)` of the student's own classifier, x the image and x' the
    edited one, the edit's turn descends on `-D(x') + stability * KL(teacher(x) || teacher(x')) - diversity`, through
    both networks, which stay as they are (BatchNorm with running statistics). It declines while D
    on edited images is above `upper` times its running mean on clean ones, until it is below
    `lower` times it. The student's terms see edited images like any others: with their labels, which
    an edit that mixes turns into shares, as `Mix` does.

    The edit is the player `augmentor`: Adam with 1e-4 and no weight decay is a good start. Its bounds
    must leave the classes recognisable, and so must `stability` for edits that could fool the teacher.
    Which rows are edited is fixed, evenly spread over the batch; rows 2k and 2k + 1 are each other's
    partners. Micro-batches must be even, and the share of each a whole number.

    Args:
        edit: `Affine`, `AffineRange`, `Mask`, `LatentEdit` or another `Edit`.
        temperature: T > 0.
        stability: weight >= 0 of the teacher's own change.
        diversity: weight >= 0 of how much the edit's numbers differ between two draws of its noise, on
            average: what is hardest is found by chance and then left alone, what is varied is covered.
        upper, lower: the switch, 0 < lower <= upper; without `upper` it never pauses. `share` 1 needs that.
        warmup: steps without edits.
        every: steps from one turn of the edit to the next.
        momentum: of the running mean, in [0, 1).
        share: of the images that are edited, in (0, 1], taken as a fraction of at most 100 parts. With 1 the
            student sees clean images in the warm-up alone, and there is nothing for the switch to compare with.

    Raises:
        SettingsError: a number outside its range, a switch with nothing to compare, or a teacher that
            cannot answer to new images.
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
        share: float = 0.5,
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
        if not 0 < share <= 1 or not (fraction := Fraction(share).limit_denominator(100)):
            raise SettingsError(f"need share in (0, 1], as a fraction of at most 100 parts, got {share}")
        if fraction == 1 and upper < math.inf:
            raise SettingsError(
                f"upper={upper} compares edited images with clean ones, and share={share} leaves none: "
                f"set upper to null or take a smaller share"
            )
        self.temperature, self.fraction = positive_temperature(temperature), fraction.as_integer_ratio()
        self.stability, self.diversity, self.upper, self.lower = stability, diversity, upper, lower
        self.warmup, self.every, self.momentum = warmup, every, momentum
        self.players[""] = edit
        self.frozen |= edit.frozen
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
        rows, _ = self.rows(len(image), image.device)
        own, partner = image[rows], image[rows ^ 1]
        with torch.autocast(image.device.type, enabled=False):
            code = self.edit.encode(own)
        share = torch.ones(len(image), dtype=image.dtype, device=image.device)
        if draw.step >= self.warmup:
            hard, kept = self.edited(code, self.edit.noise(image, draws, "hard.student")[rows], partner)
            data, share = data | {"image": image.index_copy(0, rows, hard)}, share.index_copy(0, rows, kept)
        if self.soft_labels:
            data = self._mixed(data, share)
        given = {"image": own, "code": code, "partner": partner}
        given["noise"] = self.edit.noise(image, draws, "hard.search")[rows]
        if self.diversity:
            given["other_noise"] = self.edit.noise(image, draws, "hard.other")[rows]
        return batch | {TRAIN: data, "hard": given}

    def rows(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which rows of a micro-batch of `count` are edited and which are not, int64.

        Whole periods only, so that every split of the batch edits the same images.

        Raises:
            SettingsError: an odd count, or a share of it that is no whole number.
        """
        edited, of = self.fraction
        if count % 2 or count * edited % of:
            raise SettingsError(
                f"{edited} of {of} rows of a micro-batch are edited, in pairs of partners, and it has {count}: choose "
                f"batch_size so that batch_size / (processes x grad_accum_steps) is even and divisible by {of}"
            )
        # Row r is edited where floor((r + 1) share) > floor(r share): these are the r at which that happens.
        hard = torch.arange(1, count * edited // of + 1, device=device).mul(of).add(edited - 1)
        clean = torch.arange(count - len(hard), device=device).mul(of)
        return hard.div(edited, rounding_mode="floor") - 1, clean.div(max(of - edited, 1), rounding_mode="floor")

    def edited(self, code: Tensor, noise: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """The edit's answer, in the images' own precision: autocast would round pixels."""
        with torch.autocast(code.device.type, enabled=False):
            return self.edit(code, noise, partner)

    def search_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        """What the edit descends on."""
        student, teacher = self._networks
        given = batch["hard"]
        hard, _ = self.edited(given["code"], given["noise"], given["partner"])
        answer = teacher.targets({"image": hard})["logits"]
        terms = {"disagreement": -kd_loss(student(hard).logits, answer, self.temperature)}
        if self.stability:
            with torch.no_grad():
                before = teacher.targets({"image": given["image"]})["logits"]
            terms["stability"] = self.stability * kd_loss(answer, before, self.temperature)
        if self.diversity:
            with torch.autocast(hard.device.type, enabled=False):
                one, other = (
                    self.edit.numbers(given["code"], given[noise], given["partner"])
                    for noise in ("noise", "other_noise")
                )
            terms["diversity"] = -self.diversity * (one - other).abs().mean()
        return terms, {"skip": 0.5 - self.searching}

    def observe(self, view: View) -> Carry:
        hard, clean = self.rows(len(view.logits), view.logits.device)
        if not len(clean):  # nothing to compare
            return {}
        each = kd_loss(view.logits.detach(), view.teacher_logits, self.temperature, reduction="none")
        return {"clean": mean_across(each[clean].mean()), "hard": mean_across(each[hard].mean())}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor]:
        if "clean" not in carry:
            return {}
        now, hard = carry["clean"].to(self.clean.dtype), carry["hard"].to(self.clean.dtype)
        clean = torch.where(self.clean < 0, now, torch.lerp(now, self.clean, self.momentum))
        below = torch.where(self.searching > 0, hard <= self.upper * clean, hard < self.lower * clean)
        return {"clean": clean, "searching": below.to(self.searching.dtype)}

    def draw(self, images: Tensor, folder: Path) -> None:
        """Writes `edits.png`: images `[B, C, H, W]` in [0, 1], B even, and what the edit makes of them."""
        draw_edits(self.edit, images.to(self.clean.device), folder / "edits.png")

    def _mixed(self, data: Batch, share: Tensor) -> Batch:
        label = labels_of(data)
        partner = label[torch.arange(len(label), device=label.device) ^ 1]
        target = soft_target(label, self._classes, share) + soft_target(partner, self._classes, 1 - share)
        return {name: value for name, value in data.items() if name != "label"} | {"target": target}
