"""Randomness as a pure function of (seed, step, tag), independent of processes and micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_WORD = 0xFFFFFFFFFFFFFFFF


def key(*parts: int | str) -> int:
    """A 63-bit seed from any mix of names and numbers, equal on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Reseed:
    """Seeds the generator that dropout reads, by step and micro-batch.

    It happens in every turn, so it is cheap: one hash for all steps, a few multiplications for each
    (splitmix64), and the generator's own method (`torch.manual_seed` walks every device and costs
    a hundred times more).
    """

    def __init__(self, device: torch.device, *parts: int | str) -> None:
        self.base = key(*parts)
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index or 0])

    def __call__(self, step: int, micro: int = 0) -> None:
        value = (self.base + (step * 65536 + micro) * 0x9E3779B97F4A7C15) & _WORD
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
        for generator in self.generators:
            generator.manual_seed((value ^ (value >> 31)) >> 1)


class Draw:
    """Random tensors for one micro-batch: rows `low` to `high` of one global draw.

    The global draw is made in blocks of `block` rows, one generator call each, so that every
    split of the batch over processes and micro-batches sees the same noise. A tag names one draw:
    the same tag twice in a step gives the same numbers.

    Args:
        step: step of the stage, for schedules in `prepare`.
        rows: `{stream name: (low, high)}` of the global batch; the key `""` is the run's own batch.
        block: rows per block; divides every `low` and `high`.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        rows: Mapping[str, tuple[int, int]],
        block: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        stream: str = "",
    ) -> None:
        self.seed, self.step, self.rows, self.block = seed, step, rows, block
        self.device, self.dtype, self.stream = device, dtype, stream
        self.generator = torch.Generator(device)

    def of(self, stream: str) -> Draw:
        """The draw whose rows are those of `stream`, where its batch size differs from the run's."""
        return Draw(self.seed, self.step, self.rows, self.block, self.device, self.dtype, stream)

    @property
    def shared(self) -> Shared:
        """Draws without a row dimension of the batch: equal on every process and micro-batch."""
        return Shared(self)

    def normal(self, tag: str, *shape: int) -> Tensor:
        """Standard normal `[rows, *shape]`."""
        return self._rows(tag, shape, self.dtype, lambda out, g: out.normal_(generator=g))

    def uniform(self, tag: str, *shape: int) -> Tensor:
        """Uniform on [0, 1), `[rows, *shape]`."""
        return self._rows(tag, shape, self.dtype, lambda out, g: out.uniform_(generator=g))

    def integers(self, tag: str, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high), int64 `[rows, *shape]`."""
        return self._rows(tag, shape, torch.int64, lambda out, g: out.random_(low, high, generator=g))

    def _rows(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable) -> Tensor:
        low, high = self.rows[self.stream]
        out = torch.empty(high - low, *shape, dtype=dtype, device=self.device)
        for start in range(low, high, self.block):
            self._seed(tag, start // self.block)
            fill(out[start - low : start - low + self.block], self.generator)
        return out

    def _seed(self, tag: str, block: int | str) -> None:
        self.generator.manual_seed(key(self.seed, self.step, self.stream, tag, block))


class Shared:
    """See `Draw.shared`; shapes are taken as given."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def normal(self, tag: str, *shape: int) -> Tensor:
        return self._empty(tag, shape, self._draw.dtype).normal_(generator=self._draw.generator)

    def uniform(self, tag: str, *shape: int) -> Tensor:
        return self._empty(tag, shape, self._draw.dtype).uniform_(generator=self._draw.generator)

    def integers(self, tag: str, low: int, high: int, *shape: int) -> Tensor:
        return self._empty(tag, shape, torch.int64).random_(low, high, generator=self._draw.generator)

    def _empty(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._draw._seed(tag, "shared")
        return torch.empty(shape, dtype=dtype, device=self._draw.device)
