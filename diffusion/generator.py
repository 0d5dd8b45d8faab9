"""What a trained diffusion model is as a whole: a denoiser, its images' code, its conditions, its way to sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.codecs import Codec, Pixels
from diffusion.conditions import Conditions
from diffusion.denoiser import Denoiser, Interval, check_guidance
from diffusion.process import EDMProcess, VPProcess
from diffusion.samplers import ddim, euler, heun, renoise
from diffusion.tensors import choose
from visiondistill.engine.rng import key

Sampler = Literal["auto", "ddim", "euler", "heun", "student"]


class Generator(nn.Module):
    """A denoiser with what it takes to make images: methods take one as teacher and hand one on.

    Args:
        denoiser: predicts on codes of images.
        shape: of one code, without the batch: `(C, H, W)` or `(F, C, H, W)`.
        codec: between images in [0, 1] and codes; default `Pixels()`.
        conditions: what it is conditioned on; None for nothing.
        steps: that it samples with where a caller names no number.
        sampler: "student": its own few times with fresh noise between them, as students are trained;
            "ddim", "euler", "heun"; "auto": DDIM on discrete VP paths, Heun on EDM's, Euler on others.
        guidance_scale: of sampling; 1 is off, whatever the two below say.
        guidance_interval: (low, high) in the process's own time, where guidance acts; None: all times.
        guidance_rescale: in [0, 1], of the guided prediction to the conditional one's contrast; 0 is off.

    Raises:
        ValueError: an unknown sampler, one that the path does not have, guidance without conditions, an
            interval that leaves the path's times, or a rescale outside [0, 1].
    """

    finetune_command = "visiondistill train --recipe denoising --data.root DIR --data.size N"
    """Makes a teacher of other classes."""

    notes: Sequence[str] = ()
    """What a preflight says of where it comes from."""

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        *,
        codec: Codec | None = None,
        conditions: Conditions | None = None,
        steps: int = 50,
        sampler: Sampler = "auto",
        guidance_scale: float = 1.0,
        guidance_interval: Interval | None = None,
        guidance_rescale: float = 0.0,
    ) -> None:
        super().__init__()
        choose("sampler", sampler, ("auto", "ddim", "euler", "heun", "student"))
        if guidance_scale != 1 and conditions is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs conditions; 1 switches guidance off")
        check_guidance(denoiser.process, guidance_interval, guidance_rescale)
        self.denoiser, self.codec = denoiser, codec or Pixels()
        self.shape, self.conditions = tuple(shape), conditions
        self.steps, self.guidance_scale, self.guidance_rescale = steps, guidance_scale, guidance_rescale
        self.guidance_interval = None if guidance_interval is None else tuple(guidance_interval)
        self.sampler = _usual(denoiser) if sampler == "auto" else sampler
        if self.sampler in ("euler", "heun") and isinstance(denoiser.process, VPProcess):
            raise ValueError(f"sampler={sampler!r} needs continuous time, which a table has not: ddim samples it")

    @property
    def process(self) -> Any:
        return self.denoiser.process

    @property
    def guidance(self) -> dict[str, Any]:
        """What it samples with, by the names that the arguments have here and in `Denoiser.forward`."""
        names = ("guidance_scale", "guidance_interval", "guidance_rescale")
        return {name: getattr(self, name) for name in names}

    def guidance_but(
        self, scale: float | None = None, interval: Interval | None = None, rescale: float | None = None
    ) -> dict[str, Any]:
        """`guidance`, with what is said in place of its own; None leaves it."""
        said = {"guidance_scale": scale, "guidance_interval": interval, "guidance_rescale": rescale}
        return self.guidance | {name: value for name, value in said.items() if value is not None}

    @property
    def input_size(self) -> tuple[int, ...]:
        """`(C, H, W)` of its images."""
        return self.codec.image_size(self.shape)

    @property
    def num_classes(self) -> int | None:
        """Of its class labels; None where it is conditioned on nothing, or on something else."""
        return getattr(self.conditions, "num_classes", None)

    def student(self, denoiser: Denoiser, steps: int) -> Generator:
        """The same around a student's denoiser, which samples with `steps` steps of its own and no guidance."""
        return Generator(
            denoiser, self.shape, codec=self.codec, conditions=self.conditions, steps=steps, sampler="student"
        )

    def times(self, steps: int | None = None) -> Tensor:
        """The grid of `steps` steps, `[steps + 1]`, falling to the clean end."""
        steps = steps or self.steps
        return self.process.student_times(steps) if self.sampler == "student" else self.process.timesteps(steps)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Any = None,
        null_condition: Any = None,
        *,
        steps: int | None = None,
        noises: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Codes from unit noise `[B, *shape]`.

        Args:
            condition, null_condition: as the denoiser takes them; the latter for guidance alone.
            steps: default the generator's own.
            noises: of a student's later steps, `steps - 1` tensors like `noise`; default drawn.
        """
        times, process = self.times(steps), self.process

        def model(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x, t, condition, null_condition=null_condition, **self.guidance).x0

        start = process.start(noise, times[0])
        if self.sampler == "student":
            return renoise(model, start, times, process, noises=noises, sigma_min=self.denoiser.sigma_min)
        run = {"ddim": ddim, "euler": euler, "heun": heun}[self.sampler]
        return run(model, start, times, process, prediction_type="x0")

    @torch.no_grad()
    def images(
        self, count: int, *, batch_size: int = 64, steps: int | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Stream `count` images in [0, 1] with their labels (None where there are none), batch by batch.

        Image i depends on the seed and i alone, never on the batch size or on the number of steps:
        generators with codes of one shape are comparable image by image.
        """
        device = next((held.device for held in chain(self.parameters(), self.buffers())), torch.device("cpu"))
        steps = steps or self.steps
        for low in range(0, count, batch_size):
            rows = range(low, min(low + batch_size, count))
            noise, *noises = (_noise(rows, self.shape, seed, device, place) for place in range(steps))
            condition, null_condition, labels = None, None, None
            if self.conditions is not None:
                condition, null_condition = self.conditions.at(rows, device)
                labels = condition if self.num_classes else None
            codes = self.sample(noise, condition, null_condition, steps=steps, noises=noises)
            yield self.codec.decode(codes).clamp(0, 1), labels


def _usual(denoiser: Denoiser) -> str:
    if isinstance(denoiser.process, VPProcess):
        return "ddim"
    return "heun" if isinstance(denoiser.process, EDMProcess) else "euler"


def _noise(rows: range, shape: tuple[int, ...], seed: int, device: torch.device, place: int) -> Tensor:
    generator = torch.Generator()
    each = []
    for row in rows:
        generator.manual_seed(key(seed, "sample", place, row))
        each.append(torch.randn(shape, generator=generator))
    return torch.stack(each).to(device)
