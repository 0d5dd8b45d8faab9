"""DMD2: a one- or few-step student whose samples match the teacher's distribution.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis"
(arXiv 2405.14867), without the adversarial term.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.conditions import Conditions
from diffusion.denoiser import Denoiser
from diffusion.losses import denoising_loss, dmd_loss, edm_loss_weight
from diffusion.process import TimeLaw
from diffusion.samplers import simulate_student_input
from diffusion.tensors import choose, expand_time
from visiondistill.engine.method import Batch, Carry, Method, Terms, Turn
from visiondistill.engine.rng import Draw, key

SCORE_RANGE = (0.02, 0.98)
"""The paper's T_min and T_max, as shares of the way from clean to noise."""


class DMD2(Method):
    """Students move by the difference of two scores; a critic learns the score of their samples.

    Turns: "student" every `student_every` steps, then "critic" in every step, on the same
    generated images, made before the student moved. No data are needed.

    Args:
        teacher: the frozen denoiser ("real score").
        shape: of one sample, without the batch.
        student: default a copy of the teacher. Runs on the teacher's process, may be of any
            prediction type.
        fake_score: the critic, a denoiser of the student's samples; default a copy of the teacher.
        student_every: critic updates per student update, the paper's ratio (5; 10 for SD 1.5).
        student_steps: steps that the student takes; above 1 it trains on inputs that it made
            itself (backward simulation) at the times `teacher.process.student_times(student_steps)`.
        guidance_scale: s of the real score's guidance; 1 is off. The fake score is never guided.
        conditions: `(batch, draw) -> (condition, null condition)`, such as `ClassLabels`; None: the
            networks take no condition.
        score_times: law of the noise levels at which the scores are compared; default the
            process's own law on 2 % to 98 % of its way.
        critic_times: law of the critic's noise levels; default the process's own law, all of it.
        critic_space: what the critic's squared error is taken of.
        sigma_data: of EDM's weight on the critic's error; None: unweighted (as for SD and SDXL,
            with critic_space "eps").
        normalize: divide each sample's field by its distance from the teacher's prediction.

    Raises:
        ValueError: student_every < 1, student_steps < 1, guidance without conditions, EDM's weight
            on anything but "x0".
    """

    def __init__(
        self,
        teacher: Denoiser,
        shape: Sequence[int],
        *,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
        student_every: int = 5,
        student_steps: int = 1,
        guidance_scale: float = 1.0,
        conditions: Conditions | None = None,
        score_times: TimeLaw | None = None,
        critic_times: TimeLaw | None = None,
        critic_space: str = "x0",
        sigma_data: float | None = 0.5,
        normalize: bool = True,
    ) -> None:
        choose("critic_space", critic_space, ("x0", "eps", "v", "velocity"))
        if sigma_data is not None and critic_space != "x0":
            raise ValueError(f"sigma_data={sigma_data} weights the error of x0: set it to None for {critic_space!r}")
        if guidance_scale != 1 and conditions is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs conditions; 1 switches guidance off")
        super().__init__(
            players={
                "student": student or trainable_copy(teacher),
                "fake_score": fake_score or trainable_copy(teacher),
            },
            frozen={"teacher": teacher},
        )
        process = teacher.process
        self.process, self.shape, self.student_every = process, tuple(shape), student_every
        self.guidance_scale, self.conditions = guidance_scale, conditions
        self.critic_space, self.sigma_data, self.normalize = critic_space, sigma_data, normalize
        self.times = process.student_times(student_steps).tolist()
        self.score_times = score_times or process.time_law(*SCORE_RANGE)
        self.critic_times = critic_times or process.time_law()

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("student", self.student_loss, moves=("student",), every=self.student_every),
            Turn("critic", self.critic_loss, moves=("fake_score",)),
        )

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
        # Where the student plays, its turn carries its images on under this same name.
        return batch if "student" in due else batch | {"images": self.generate(x_t, t, condition)}

    def generate(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """The student's clean samples from its input."""
        return self.players["student"](x_t, t, condition).x0

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        images = self.generate(**batch["input"], condition=batch["condition"])
        x_t = self.process.add_noise(images, **batch["score"])
        with torch.no_grad():
            t, condition = batch["score"]["t"], batch["condition"]
            real = self.frozen["teacher"](
                x_t, t, condition, guidance_scale=self.guidance_scale, null_condition=batch["null_condition"]
            ).x0
            fake = self.players["fake_score"](x_t, t, condition).x0
        return {"dmd": dmd_loss(images, real, fake, normalize=self.normalize)}, {"images": images}

    def critic_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        sample = self.process.noised(batch["images"], **batch["critic"])
        prediction = self.players["fake_score"](sample.x_t, sample.t, batch["condition"])
        loss = denoising_loss(
            prediction.of(self.critic_space), sample.of(self.critic_space), weight=self._critic_weight(sample.t)
        )
        return {"denoising": loss}, {}

    def _critic_weight(self, t: Tensor) -> Tensor | None:
        if self.sigma_data is None:
            return None
        return edm_loss_weight(self.process.sigma(t) / self.process.alpha(t), self.sigma_data)

    def _noise(self, tag: str, law: TimeLaw, draw: Draw) -> dict[str, Tensor]:
        return {"noise": draw.normal(f"{tag}/noise", *self.shape), "t": law(draw.uniform(f"{tag}/time"))}

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
            student, noise, self.times, exit_step, self.process, start_noise=start, noises=between
        )


def trainable_copy(teacher: Denoiser) -> Denoiser:
    """A copy of a denoiser, frozen or not, that a player can be."""
    return copy.deepcopy(teacher).requires_grad_(True)
