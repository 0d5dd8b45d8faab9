"""Distribution matching: DMD2, and by its settings DMD and Diff-Instruct.

DMD2: Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis"
(arXiv 2405.14867), equations 2 (matching), 3 (DMD's regression) and 4 (GAN), sections 4.2 (two time scales)
and 4.5 (backward simulation).
DMD (Yin et al. 2023, arXiv 2311.18828), equations 7 and 8: `regression`, student_every=1, no `gan`.
Diff-Instruct (Luo et al. 2023, arXiv 2305.18455), equation 3.2: normalize=False, student_every=1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.critics import GAN, discriminator_of
from diffusion.denoiser import Denoiser, Interval, check_guidance
from diffusion.generator import Generator
from diffusion.losses import (
    dmd_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    regression_loss,
)
from diffusion.losses.denoising import TARGETS
from diffusion.losses.regression import KINDS
from diffusion.methods.base import (
    GeneratorMethod,
    condition_of,
    denoising_error,
    has_null,
    only,
    own_space,
    require_level,
    require_same_path,
    require_space,
    trainable_copy,
)
from diffusion.models.networks import frozen_copy
from diffusion.pairs import Pairs
from diffusion.process import TimeLaw
from diffusion.samplers import simulate_student_input
from diffusion.tensors import choose, expand_time, lead
from visiondistill.engine.method import Batch, Carry, Stream, Terms, Turn
from visiondistill.engine.rng import Draw, key

SCORE_RANGE = (0.02, 0.98)
"""The paper's T_min and T_max, as shares of the way from clean to noise."""
R1_STEP = 0.1
"""Of the finite difference, in units of the noise level: small enough to stay on it."""


@dataclass(frozen=True)
class Regression:
    """DMD's pull towards what the teacher makes of the same noise.

    Args:
        pairs: folder of the store that `diffusion.pairs.store_pairs` made with this teacher.
        batch_size: pairs per step.
        weight: relative to the mean-reduced distribution-matching loss; the paper's 0.25 belongs to LPIPS.
        kind: distance.

    Raises:
        ValueError: a negative weight or unknown kind.
    """

    pairs: str
    batch_size: int
    weight: float = 5.0
    kind: Literal["l2", "pseudo_huber"] = "l2"

    def __post_init__(self) -> None:
        choose("kind", self.kind, KINDS)
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} is not allowed: 0 or more")


@dataclass(frozen=True)
class Otherwise(Turn):
    """A turn that plays at all steps but the last of every `cycle`."""

    cycle: int = 2

    def due(self, step: int) -> bool:
        return step % self.cycle != self.cycle - 1

    def count(self, step: int) -> int:
        return step - step // self.cycle


class DMD2(GeneratorMethod):
    """Students move by the difference of two scores; a critic learns the score of their samples.

    Turns: "student" every `student_every` steps, then "critic" in every step, on the same
    generated images, made before the student moved. Data are read for the adversarial term alone.

    Args:
        teacher: the frozen generator ("real score").
        student: default a copy of the teacher's denoiser. Runs on the teacher's process, may be of
            any prediction type.
        fake_score: the critic, a denoiser of the student's samples on the same process; default a
            copy of the teacher's.
        streams: with images (and labels, for conditions) or their codes under "train", for `gan`.
        teacher_precision: "bf16" keeps the teacher in half the memory; players keep the precision of the original.
        student_every: critic updates per student update, the paper's ratio (5; 10 for SD 1.5).
        alternate: of `student_every` steps the last is the student's alone and the others are the
            critic's, instead of a critic that plays in every step.
        student_steps: steps that the student takes; above 1 it trains on inputs that it made
            itself (backward simulation) at the times `teacher.process.student_times(student_steps)`.
        guidance_scale, guidance_interval, guidance_rescale: of the real score, as of `Generator`; each by
            default what the teacher samples with (an interval of all times lifts the teacher's). The fake
            score is never guided.
        score_times: law of the noise levels at which the scores are compared; default the
            process's own law on 2 % to 98 % of its way.
        critic_times: law of the critic's noise levels; default the process's own law, all of it.
        frame_block: of videos: frames that share a noise level; default all.
        critic_space: what the critic's squared error is taken of; default what it predicts.
        sigma_data: of EDM's weight, for errors of "x0"; None: unweighted, as errors in other spaces are.
        normalize: divide each sample's field by its distance from the teacher's prediction.
        gan: the adversarial term, DMD2's on real images.
        regression: DMD's term on stored pairs.

    Raises:
        ValueError: student_every < 1 (2 to alternate), student_steps < 1, guidance without
            null conditions or as of `check_guidance`, a student or critic on another path, of another shape or
            with weights of another role, a teacher that has no other precision, pairs of another teacher or of
            another guidance than it samples with, or `gan` without data, with data that lack the teacher's
            conditions (labels, prompts), or with taps that cannot be judged.
    """

    def __init__(
        self,
        teacher: Generator,
        *,
        student: Generator | None = None,
        fake_score: Generator | Denoiser | None = None,
        streams: Mapping[str, Stream] | None = None,
        teacher_precision: Literal["own", "bf16"] = "own",
        student_every: int = 5,
        alternate: bool = False,
        student_steps: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: Interval | None = None,
        guidance_rescale: float | None = None,
        score_times: TimeLaw | None = None,
        critic_times: TimeLaw | None = None,
        frame_block: int | None = None,
        critic_space: Literal["x0", "eps", "v", "velocity"] | None = None,
        sigma_data: float | None = 0.5,
        normalize: bool = True,
        gan: GAN | None = None,
        regression: Regression | None = None,
    ) -> None:
        choose("critic_space", critic_space, (None, *TARGETS))
        choose("teacher_precision", teacher_precision, ("own", "bf16"))
        guidance = _guidance(teacher, guidance_scale, guidance_interval, guidance_rescale)
        if student_every < 1 + alternate:
            raise ValueError(f"student_every={student_every} is not allowed: at least {1 + alternate}")
        players = {
            role: _player(role, own, teacher) for role, own in (("student", student), ("fake_score", fake_score))
        }
        _require_own_weights(teacher, players)
        kept = frozen_copy(teacher) if teacher_precision == "bf16" else teacher
        super().__init__(kept, players, frozen={"teacher": kept}, frame_block=frame_block)
        self.student_every, self.alternate, self.student_steps = student_every, alternate, student_steps
        self.guidance, self.normalize = guidance, normalize
        space = critic_space or own_space(self.players["fake_score"])
        self.critic_space, self.sigma_data = require_space("critic_space", space, self.process), sigma_data
        self.times = self.process.student_times(student_steps).tolist()
        self.score_times = require_level(
            "score_times", score_times or self.process.time_law(*SCORE_RANGE), self.process
        )
        self.critic_times = require_level("critic_times", critic_times or self.process.time_law(), self.process)
        self.gan, self._pairs = gan, None
        if gan is not None:
            self.streams |= only(streams, "train", teacher, why="the adversarial term")
            self.gan_times = require_level("gan.times", gan.times or self.process.time_law(), self.process)
            self.players["discriminator"] = self._discriminator()
        if regression is not None:
            # Not the folder: it may move, and what it holds is compared by value.
            self.regression_weight, self.regression_kind = regression.weight, regression.kind
            self._pairs = Pairs(regression.pairs, teacher)  # made by the original
            self.streams["pairs"] = self._pairs.stream(regression.batch_size)

    @property
    def teacher(self) -> Generator:
        return self.frozen["teacher"]

    @property
    def guidance_scale(self) -> float:
        return self.guidance["guidance_scale"]

    def generator(self, network: Denoiser | None = None) -> Generator:
        return self.teacher.student(network or self.product(), self.student_steps)

    def turns(self) -> tuple[Turn, ...]:
        moves = ("fake_score",) if self.gan is None else ("fake_score", "discriminator")
        if self.alternate:
            last = self.student_every - 1
            return (
                Turn("student", self.student_loss, moves=("student",), every=self.student_every, offset=last),
                Otherwise("critic", self.critic_loss, moves=moves, cycle=self.student_every),
            )
        return (
            Turn("student", self.student_loss, moves=("student",), every=self.student_every),
            Turn("critic", self.critic_loss, moves=moves),
        )

    # --- what the losses read

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        condition, null_condition = self.conditions(batch, draw) if self.conditions else (None, None)
        x_t, t = self._student_input(draw, condition)
        batch = {
            **batch,
            "input": {"x_t": x_t, "t": t},
            "condition": condition,
            "null_condition": null_condition,
            "score": self._noise("score", self.score_times, draw),
            "critic": self._noise("critic", self.critic_times, draw),
        }
        if self.gan is not None:
            batch |= self._judged(batch["train"], draw, due)
        if self._pairs is not None:
            batch["pair"] = self._pair(batch["pairs"], draw)
        # Where the student plays, its turn carries its images on under this same name.
        return batch if "student" in due else batch | {"images": self.generate(x_t, t, condition)}

    def generate(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """The student's clean samples from its input."""
        return self.players["student"](x_t, t, condition).x0

    def _judged(self, data: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        """Noise for the images, and real samples with their own conditions where a turn compares with them."""
        judged: Batch = {
            "judged_by_student": self._noise("gan/student", self.gan_times, draw),
            "judged_by_critic": self._noise("gan/critic", self.gan_times, draw),
        }
        if "critic" not in due and self.gan.kind != "relativistic":
            return judged
        draw = draw.of("train")
        x0, noise = self._codes(self.teacher.codec, data, draw), self._noise("gan/real", self.gan_times, draw)
        real = {"x_t": self.process.add_noise(x0, **noise), "t": noise["t"]}
        judged["judged_real"] = real | {"condition": condition_of(self.conditions, data)[0]}
        if self.gan.r1:
            beside = draw.normal("gan/r1", *self.shape)
            step = lead(R1_STEP * self.process.sigma(noise["t"]), beside).to(beside.dtype) * beside
            judged["judged_beside"] = judged["judged_real"] | {"x_t": real["x_t"] + step}
        return judged

    def _pair(self, pairs: Batch, draw: Draw) -> Batch:
        noise = pairs["noise"].to(draw.dtype)
        t = expand_time(self.times[0], noise)
        x_t, condition = self.process.start(noise, t), self._pairs.condition(pairs)
        return {"input": {"x_t": x_t, "t": t, "condition": condition}, "code": pairs["code"].to(draw.dtype)}

    def _student_input(self, draw: Draw, condition: Any) -> tuple[Tensor, Tensor]:
        noise, steps = draw.normal("input/noise", *self.shape), len(self.times) - 1
        # One exit for the whole batch, as in the paper; drawn on the host, which would wait for a tensor of the device.
        exit_step = key(draw.seed, draw.step, "input/exit") % steps
        first = expand_time(self.times[0], noise)
        if exit_step == 0:
            return self.process.start(noise, first), first
        start = self.process.start(draw.normal("input/start", *self.shape), first)
        between = [draw.normal(f"input/renoise_{i}", *self.shape) for i in range(exit_step - 1)]

        def student(x_t: Tensor, t: Tensor) -> Tensor:
            return self.generate(x_t, t, condition)

        return simulate_student_input(
            student,
            noise,
            self.times,
            exit_step,
            self.process,
            start_noise=start,
            noises=between,
            sigma_min=self.players["student"].sigma_min,
        )

    # --- the turns' losses

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        condition = batch["condition"]
        images = self.generate(**batch["input"], condition=condition)
        x_t, t = self.process.add_noise(images, **batch["score"]), batch["score"]["t"]
        with torch.no_grad():
            real = self.teacher.denoiser(x_t, t, condition, null_condition=batch["null_condition"], **self.guidance)
            fake = self.players["fake_score"](x_t, t, condition)
        terms = {"dmd": dmd_loss(images, real.x0, fake.x0, normalize=self.normalize)}
        if self.gan is not None:
            terms["gan"] = self.gan.generator_weight * self._generator_loss(images, batch)
        if self._pairs is not None:
            pair = batch["pair"]
            distance = regression_loss(self.generate(**pair["input"]), pair["code"], kind=self.regression_kind)
            terms["regression"] = self.regression_weight * distance
        return terms, {"images": images}

    def critic_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        sample = self.process.noised(batch["images"], **batch["critic"])
        prediction = self.players["fake_score"](sample.x_t, sample.t, batch["condition"])
        terms = {"denoising": denoising_error(prediction, sample, self.critic_space, self.sigma_data)}
        if self.gan is not None:
            fake = self._logits_of_images(batch["images"], batch, "judged_by_critic")
            real = self._logits(**batch["judged_real"])
            terms["gan"] = self.gan.critic_weight * gan_discriminator_loss(real, fake, kind=self.gan.kind)
            if self.gan.r1:
                terms["r1"] = self.gan.r1 * (self._logits(**batch["judged_beside"]) - real).square().mean()
        return terms, {}

    def _generator_loss(self, images: Tensor, batch: Batch) -> Tensor:
        fake = self._logits_of_images(images, batch, "judged_by_student")
        real = None
        if self.gan.kind == "relativistic":
            with torch.no_grad():
                real = self._logits(**batch["judged_real"])
        return gan_generator_loss(fake, real, kind=self.gan.kind)

    def _logits_of_images(self, images: Tensor, batch: Batch, noise: str) -> Tensor:
        x_t = self.process.add_noise(images, **batch[noise])
        return self._logits(x_t, batch[noise]["t"], batch["condition"])

    def _logits(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        _, features = self._judge.features(x_t, t, condition, taps=self.gan.taps)
        return self.players["discriminator"](features, len(x_t))

    @property
    def _judge(self) -> Denoiser:
        return self.teacher.denoiser if self.gan.features == "teacher" else self.players["fake_score"]

    def _discriminator(self) -> torch.nn.Module:
        held = next(self._judge.parameters(), torch.empty(()))
        x_t = torch.zeros(1, *self.shape, dtype=torch.promote_types(held.dtype, torch.float32), device=held.device)
        condition = self.conditions.at([0], held.device)[0] if self.conditions else None
        try:
            return discriminator_of(self._judge, self.gan.taps, x_t, expand_time(self.times[0], x_t), condition)
        except ValueError as error:
            raise ValueError(f"gan.taps={list(self.gan.taps)} (in a recipe method.gan.taps): {error}") from error


def _guidance(
    teacher: Generator, scale: float | None, interval: Interval | None, rescale: float | None
) -> dict[str, Any]:
    """What the teacher samples with, where nothing else is said."""
    guidance = teacher.guidance_but(scale, interval, rescale)
    scale = guidance["guidance_scale"]
    if scale != 1 and not has_null(teacher.conditions):
        raise ValueError(f"guidance_scale={scale} needs a teacher with null conditions; 1 switches it off")
    check_guidance(teacher.process, guidance["guidance_interval"], guidance["guidance_rescale"])
    return guidance


def _player(role: str, given: Generator | Denoiser | None, teacher: Generator) -> Denoiser:
    if given is None:
        return trainable_copy(teacher.denoiser)
    require_same_path(role, given, teacher)
    return given.denoiser if isinstance(given, Generator) else given


def _require_own_weights(teacher: Generator, players: Mapping[str, Denoiser]) -> None:
    """Adapters may stand on the teacher's weights, which are then not trained."""
    owners = {id(p): "teacher" for p in teacher.denoiser.parameters()}
    for role, player in players.items():
        trained = [p for p in player.parameters() if p.requires_grad] or list(player.parameters())
        for p in trained:
            if (owner := owners.setdefault(id(p), role)) != role:
                raise ValueError(
                    f"the {role} has weights of the {owner}, so that one could not learn without the other: give "
                    f"another network, or none (in a recipe `{role}: null`) for a copy of the teacher"
                )
