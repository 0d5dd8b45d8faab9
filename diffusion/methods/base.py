"""What methods that train a generator's denoiser have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.codecs import Codec
from diffusion.conditions import Conditions
from diffusion.denoiser import Denoiser, Prediction
from diffusion.generator import Generator
from diffusion.losses import denoising_loss, edm_loss_weight
from diffusion.models.latents import Codes
from diffusion.process import Noised, Process, TimeLaw, VPProcess, block_times
from visiondistill.data import Stream as DataStream
from visiondistill.data import in_order
from visiondistill.engine.method import Batch, Method, Stream
from visiondistill.engine.rng import Draw


class GeneratorMethod(Method):
    """A method whose product is a denoiser, its first player, and which hands a whole `Generator` on.

    Args:
        like: the generator that the product is put into: it gives shape, noise path and conditions.
        players, frozen, streams: as of `Method`; `streams` are those that it reads.
        frame_block: of videos: frames that share a noise level; None: all.

    Raises:
        ValueError: frame_block for images.
    """

    def __init__(
        self,
        like: Generator,
        players: Mapping[str, nn.Module],
        frozen: Mapping[str, nn.Module] | None = None,
        streams: Mapping[str, Stream] | None = None,
        frame_block: int | None = None,
    ) -> None:
        super().__init__(players, frozen, streams)
        self.process: Process = like.process
        self.shape, self.conditions, self.frame_block = like.shape, like.conditions, frame_block
        # In a tuple, because its parts are registered as players and frozen networks.
        self._like = (like,)
        if frame_block is not None and len(self.shape) != 4:
            raise ValueError(f"frame_block={frame_block} is for videos [F, C, H, W], not for shape {list(self.shape)}")

    def generator(self, network: Denoiser | None = None) -> Generator:
        """A generator around `network` (such as the product's moving average), by default the product."""
        like = self._like[0]
        return Generator(
            network or self.product(),
            like.shape,
            codec=like.codec,
            conditions=like.conditions,
            steps=like.steps,
            sampler=like.sampler,
            **like.guidance,
        )

    def presented(self, network: Denoiser) -> Generator:
        return self.generator(network)

    def handover(self) -> Generator:
        return self.generator()

    @classmethod
    def workshop(cls) -> Any:
        from diffusion.workshop import Generators

        return Generators()

    def _noise(self, tag: str, law: TimeLaw, draw: Draw) -> dict[str, Tensor]:
        """Unit noise `[B, *shape]` and noise levels `[B]`, or `[B, F]` with `frame_block`."""
        noise = draw.normal(f"{tag}/noise", *self.shape)
        if self.frame_block is None:
            return {"noise": noise, "t": law(draw.uniform(f"{tag}/time"))}
        t = law(draw.uniform(f"{tag}/time", self.shape[0]))
        return {"noise": noise, "t": block_times(t, self.frame_block)}

    def _codes(self, codec: Codec, data: Batch, draw: Draw) -> Tensor:
        """Of a stream's batch: those that it holds ("code"), or its images' by the codec."""
        codes = data["code"] if "code" in data else codec.encode(data["image"])
        if tuple(codes.shape[1:]) != self.shape:
            raise ValueError(
                f"the data give codes of shape {list(codes.shape[1:])}, the generator makes {list(self.shape)}: "
                f"give the data its size and channels, {list(codec.image_size(self.shape))}"
            )
        return codes.to(draw.dtype)


def own_space(denoiser: Denoiser) -> str:
    """What the error of a denoiser is taken of where nobody says otherwise: what it predicts."""
    return "eps" if denoiser.prediction_type == "score" else denoiser.prediction_type


def require_level(name: str, law: TimeLaw, process: Process) -> TimeLaw:
    """The law itself. Raises ValueError where it leaves the path's times by more than its outermost thousandth."""
    last = float(law(torch.tensor([0.999], dtype=torch.float64)))
    if last > process.end_t:
        raise ValueError(
            f"{name}={law} is not allowed: it reaches {last:.6g}, and the times of {process!r} end at {process.end_t:g}"
        )
    return law


def require_space(name: str, space: str, process: Process) -> str:
    """The space itself. Raises ValueError for the velocity of a path that has none."""
    if space == "velocity" and isinstance(process, VPProcess):
        raise ValueError(f"{name}={space!r} is not allowed: a table has no continuous time; take 'v', 'eps' or 'x0'")
    return space


def denoising_error(prediction: Prediction, sample: Noised, space: str, sigma_data: float | None) -> Tensor:
    """Mean squared error in a space; that of "x0" with EDM's weight, where it has a `sigma_data`."""
    weight = None
    if space == "x0" and sigma_data is not None:
        weight = edm_loss_weight(sample.process.sigma(sample.t) / sample.process.alpha(sample.t), sigma_data)
    return denoising_loss(prediction.of(space), sample.of(space), weight=weight)


def trainable_copy(denoiser: Denoiser) -> Denoiser:
    """A copy of a denoiser, frozen or not, that a player can be."""
    return copy.deepcopy(denoiser).requires_grad_(True)


def only(streams: Mapping[str, Stream] | None, name: str, like: Generator, why: str) -> dict[str, Stream]:
    """Of all streams the one that a method reads: others are not opened.

    Raises:
        ValueError: it is missing, or holds codes of another codec than `like` has, captions of other prompts, or
            nothing that the conditions of `like` are read from.
    """
    if name not in (streams or {}):
        raise ValueError(
            f"{why} reads the stream {name!r}: name the data (there are {sorted(streams or {}) or 'none'})"
        )
    stream = streams[name]
    held = getattr(stream, "data", None)
    if isinstance(held, Codes):
        held.require(like.codec)
        held.require_prompts(like.conditions)
    if like.conditions is not None and isinstance(stream, DataStream):
        condition_of(like.conditions, next(in_order(held, 1)))
    return {name: stream}


def condition_of(conditions: Conditions | None, data: Batch) -> tuple[Any, Any]:
    """Condition and null condition of a stream's batch."""
    return (None, None) if conditions is None else conditions.of(data)


def has_null(conditions: Conditions | None) -> bool:
    """Whether there is a null condition, which guidance needs."""
    return conditions is not None and conditions.at([0], torch.device("cpu"))[1] is not None


def require_same_path(role: str, other: Denoiser | Generator, teacher: Generator) -> None:
    """Raises ValueError unless `other` runs on the teacher's path and, where it has one, at its shape."""
    ours, theirs = teacher.process, other.process
    t = torch.linspace(ours.min_t, ours.max_t, 9, dtype=torch.float64)
    if (theirs.min_t, theirs.max_t) != (ours.min_t, ours.max_t) or not (
        torch.allclose(theirs.alpha(t), ours.alpha(t), rtol=1e-6, atol=1e-9)
        and torch.allclose(theirs.sigma(t), ours.sigma(t), rtol=1e-6, atol=1e-9)
    ):
        raise ValueError(f"the {role} runs on {theirs!r}, the teacher on {ours!r}: both need one noise path")
    if isinstance(other, Generator) and other.shape != teacher.shape:
        raise ValueError(f"the {role} makes codes of shape {list(other.shape)}, the teacher of {list(teacher.shape)}")
