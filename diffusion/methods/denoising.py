"""Denoising score matching and flow matching: how teachers are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from diffusion.generator import Generator
from diffusion.losses.denoising import TARGETS
from diffusion.methods.base import (
    GeneratorMethod,
    condition_of,
    denoising_error,
    has_null,
    only,
    own_space,
    require_level,
    require_space,
)
from diffusion.process import EDMProcess, FlowProcess, Process, TimeLaw
from diffusion.tensors import choose, lead
from visiondistill.engine.method import Batch, Carry, Stream, Terms, Turn
from visiondistill.engine.rng import Draw


class Denoising(GeneratorMethod):
    """Train a generator's denoiser on noised data: EDM, DDPM and flow matching by its process and its target.

    Args:
        student: the generator to train, in place.
        streams: with images (and labels, for conditions) under "train"; or with their codes.
        space: what the squared error is taken of; default what the network predicts.
        times: law of the noise levels; default EDM's log-normal (-1.2, 1.2) on its path, the
            logit-normal (0, 1) on the linear path, uniform on others.
        sigma_data: of EDM's weight, for errors of "x0"; None: unweighted, as errors in other spaces are.
        label_dropout: share of samples that learn the null condition, which guidance needs.
        frame_block: of videos: frames that share a noise level; default all.

    Raises:
        ValueError: no stream "train", or one without the generator's conditions (labels, prompts), an unknown space, a
            label_dropout outside [0, 1) or without a null condition, or frame_block for images.
    """

    def __init__(
        self,
        student: Generator,
        streams: Mapping[str, Stream] | None = None,
        space: Literal["x0", "eps", "v", "velocity"] | None = None,
        times: TimeLaw | None = None,
        sigma_data: float | None = 0.5,
        label_dropout: float = 0.1,
        frame_block: int | None = None,
    ) -> None:
        choose("space", space, (None, *TARGETS))
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout={label_dropout} is not allowed: from 0 to below 1")
        if label_dropout and student.conditions is not None and not has_null(student.conditions):
            raise ValueError(f"label_dropout={label_dropout} needs a null condition, which the generator lacks: set 0")
        super().__init__(
            student,
            {"student": student.denoiser},
            frozen={"codec": student.codec},
            streams=only(streams, "train", student, why="Denoising"),
            frame_block=frame_block,
        )
        self.space = require_space("space", space or own_space(student.denoiser), self.process)
        self.times, self.sigma_data = require_level("times", times or usual_law(self.process), self.process), sigma_data
        self.label_dropout = label_dropout

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.student_loss, moves=("student",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        data, draw = batch["train"], draw.of("train")
        return batch | {
            "x0": self._codes(self.frozen["codec"], data, draw),
            "condition": self._condition(data, draw),
            "noised": self._noise("noised", self.times, draw),
        }

    def _condition(self, data: Batch, draw: Draw) -> Any:
        condition, null_condition = condition_of(self.conditions, data)
        if condition is None or not self.label_dropout:
            return condition
        dropped = draw.uniform("dropped") < self.label_dropout

        def one(given: Tensor, null: Tensor) -> Tensor:
            return torch.where(lead(dropped, given), null, given)

        return tree_map(one, condition, null_condition)

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        sample = self.process.noised(batch["x0"], **batch["noised"])
        prediction = self.players["student"](sample.x_t, sample.t, batch["condition"])
        return {"denoising": denoising_error(prediction, sample, self.space, self.sigma_data)}, {}


def usual_law(process: Process) -> TimeLaw:
    """The noise levels that teachers of this path are usually trained at.

    Sources: Karras et al. 2022 (EDM), table 1; Esser et al. 2024 (SD3), section 3.1.
    """
    if isinstance(process, EDMProcess):
        return TimeLaw("lognormal", low=process.min_t, high=process.max_t, mean=-1.2, std=1.2)
    if isinstance(process, FlowProcess):
        return TimeLaw("logit_normal", high=process.max_t)
    return process.time_law()
