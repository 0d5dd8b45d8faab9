"""Two images in one, with the labels of both.

Zhang, Cisse, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412, section 2.
Yun, Han, Oh, Chun, Choe, Yoo: CutMix, ICCV 2019, arXiv 1905.04899, equations 1 and 2.
Gamma variates: Marsaglia, Tsang: A Simple Method for Generating Gamma Variables, ACM TOMS 26(3), 2000.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiondistill.augmentors.augment import TRAIN
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch
from visiondistill.engine.rng import Draw
from visiondistill.parts import Part

if TYPE_CHECKING:
    from visiondistill.models.network import Network
    from visiondistill.teachers.base import Teacher

TRIES = 24
"""Candidates per gamma variate. Each is taken with a probability above 0.95, so that none is with 1e-31."""


class Mix(Part):
    """Mixup and CutMix between neighbours: rows 2k and 2k + 1 of the batch, each with a share of its own.

    Row `i` becomes `share * image[i] + (1 - share) * image[partner]` (mixup), or has a rectangle of
    the partner (CutMix, where the share is that of the pixels left). Neighbours, because a
    permutation of the batch would depend on how it is split over processes.

    Mixed images have no label. `batch["train"]` loses "label" and gets "target", floating `[B, K]`:
    the shares at both labels; a missing label (-1) adds nothing, so that its row sums to less than 1.
    "mix" holds "share" `[B]`, "partner" (row in this micro-batch) and the two labels, "label" and
    "partner_label", int64 `[B]`.

    Args:
        num_classes: K.
        mixup: alpha >= 0 of mixup's share, Beta(alpha, alpha); 0 leaves mixup out.
        cutmix: alpha >= 0 of CutMix's share; 0 leaves CutMix out.
        switch: probability of CutMix where both are there, in [0, 1].
        probability: that a row is mixed at all, in [0, 1].

    Raises:
        SettingsError: a number outside its range, nothing to do, or micro-batches of an odd size.
    """

    views = frozenset({"mix"})
    soft_labels = True
    """Terms that need one label per image do not fit; see the class."""

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch: float = 0.5,
        probability: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if not 0 <= value < math.inf:
                raise SettingsError(f"{name}={value!r} is not allowed: it must be an alpha >= 0")
        for name, value in {"switch": switch, "probability": probability}.items():
            if not 0 <= value <= 1:
                raise SettingsError(f"{name}={value!r} is not allowed: it must be in [0, 1]")
        if num_classes < 1:
            raise SettingsError(f"num_classes={num_classes!r} is not allowed: it must be at least 1")
        if not (mixup or cutmix) or not probability:
            raise SettingsError("mixup, cutmix or probability is 0 and leaves nothing to mix: leave the augmentor out")
        self.num_classes, self.mixup, self.cutmix, self.probability = num_classes, mixup, cutmix, probability
        self.switch = switch if mixup and cutmix else float(bool(cutmix))

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        if student.num_classes not in (None, self.num_classes):
            raise SettingsError(
                f"Mix makes labels of {self.num_classes} classes, and the student tells {student.num_classes} apart: "
                f"set num_classes: {student.num_classes}"
            )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        data, draw = batch[TRAIN], draw.of(TRAIN)
        image = data["image"]
        if len(image) % 2:
            raise SettingsError(
                f"Mix pairs the rows of a micro-batch, which has {len(image)}: choose batch_size so that "
                f"batch_size / (processes x grad_accum_steps) is even"
            )
        partner = torch.arange(len(image), device=image.device) ^ 1
        # Autocast would round pixels.
        with torch.autocast(image.device.type, enabled=False):
            image, share = self._mixed(image, partner, draw)
        label = labels_of(data)
        mix = {"share": share, "partner": partner, "label": label, "partner_label": label[partner]}
        target = soft_target(label, self.num_classes, share) + soft_target(label[partner], self.num_classes, 1 - share)
        rest = {name: value for name, value in data.items() if name != "label"}
        return batch | {TRAIN: rest | {"image": image, "target": target, "mix": mix}}

    def _mixed(self, image: Tensor, partner: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The mixed images and each row's own share, `[B]`."""
        acts, switch, down, right = draw.uniform("mix", 4).unbind(1)
        cuts, other = switch < self.switch, image[partner]
        drawn = torch.ones_like(acts)
        if self.mixup:
            drawn = torch.where(cuts, drawn, beta(self.mixup, draw, "mix.mixup"))
        if self.cutmix:
            drawn = torch.where(cuts, beta(self.cutmix, draw, "mix.cutmix"), drawn)
        drawn = torch.where(acts < self.probability, drawn, 1.0)
        side = (1 - drawn).sqrt()
        own = ~_box(image, side, down, right) | ~cuts[:, None, None, None]
        # What is left of the image, counted in pixels: the rectangle was rounded to whole ones.
        share = torch.where(cuts, own.to(drawn.dtype).mean((-3, -2, -1)), drawn)
        blended = torch.lerp(other, image, drawn.to(image.dtype)[:, None, None, None])
        return torch.where(cuts[:, None, None, None], torch.where(own, image, other), blended), share


def _box(image: Tensor, side: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Bool `[B, 1, H, W]`: boxes of `side` (share of both sides, `[B]`) about a pixel; the image's edge cuts them."""
    rows, columns = _around(image.shape[-2], side, down), _around(image.shape[-1], side, right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def _around(length: int, side: Tensor, place: Tensor) -> Tensor:
    size = (side * length).floor()
    start = (place * length).floor() - (size / 2).floor()
    at = torch.arange(length, device=side.device)
    return (at >= start[:, None]) & (at < (start + size)[:, None])


def beta(alpha: float, draw: Draw, tag: str) -> Tensor:
    """`[B]` from Beta(alpha, alpha), made of normal and uniform draws alone."""
    ours, theirs = (_log_gamma_variate(alpha, draw, f"{tag}.{side}") for side in ("own", "other"))
    return torch.sigmoid(ours - theirs).to(draw.dtype)


def _log_gamma_variate(alpha: float, draw: Draw, tag: str) -> Tensor:
    """Logarithms, float64 `[B]`: for a small alpha the variates themselves underflow."""
    # Marsaglia and Tsang need alpha >= 1; G(alpha) = G(alpha + 1) U^(1 / alpha).
    d = alpha + 1 - 1 / 3
    normal = draw.normal(f"{tag}.normal", TRIES).double()
    uniform, power = draw.uniform(f"{tag}.uniform", TRIES + 1).double().split([TRIES, 1], dim=1)
    cube = (1 + normal / math.sqrt(9 * d)) ** 3
    log_cube = cube.clamp(min=1e-300).log()
    taken = (cube > 0) & ((1 - uniform).log() < normal.square() / 2 + d - d * cube + d * log_cube)
    first = taken.to(torch.uint8).argmax(1, keepdim=True)
    return math.log(d) + log_cube.gather(1, first)[:, 0] + (1 - power[:, 0]).log() / alpha


def labels_of(data: Batch) -> Tensor:
    """Of a batch, int64 `[B]`; -1 throughout where its images have none."""
    image = data["image"]
    return data["label"] if "label" in data else torch.full((len(image),), -1, device=image.device)


def soft_target(label: Tensor, num_classes: int, share: Tensor) -> Tensor:
    """`[B, K]`: the share at the label, nothing where there is none."""
    classes = torch.arange(num_classes, device=label.device)
    return (label[:, None] == classes).to(share.dtype) * share[:, None]
