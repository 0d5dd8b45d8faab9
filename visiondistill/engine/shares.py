"""This process's rows of the global batch, by micro-batch, and the feed that brings them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.launch import World
from visiondistill.engine.method import Batch, Stream
from visiondistill.engine.rng import key
from visiondistill.engine.settings import Run
from visiondistill.engine.tree import tree_map

Rows = dict[str, tuple[int, int]]


class Shares:
    """The split of every stream's global batch; the key `""` is the run's own batch size.

    Attributes:
        micro: rows of this process's micro-batches, in order.
        whole: rows of this process.
        block: rows per generator call (`Draw`).

    Raises:
        SettingsError: a batch that does not divide by processes x micro-batches, or a noise block
            that does not divide the micro-batch.
    """

    def __init__(self, streams: Mapping[str, Stream], run: Run, world: World, block: int | None = None) -> None:
        self.streams, self.run, self.world = streams, run, world
        self._feeds: list[Iterator[list[Batch]]] = []
        sizes = {"": run.batch_size} | {name: stream.batch_size for name, stream in streams.items()}
        parts = world.size * run.grad_accum_steps
        for name, size in sizes.items():
            if size % parts:
                raise SettingsError(
                    f"batch_size {size}{f' of stream {name!r}' if name else ''} is not divisible by {world.size} "
                    f"processes x grad_accum_steps {run.grad_accum_steps}"
                )
        first = world.rank * run.grad_accum_steps
        self.micro: list[Rows] = [
            {name: (i * size // parts, (i + 1) * size // parts) for name, size in sizes.items()}
            for i in range(first, first + run.grad_accum_steps)
        ]
        self.whole: Rows = {name: (self.micro[0][name][0], self.micro[-1][name][1]) for name in sizes}
        self.block = noise_block([size // parts for size in sizes.values()], run.noise_block or block)

    def feed(self, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, one `{stream: batch}` per micro-batch, on the device."""
        self._feeds.append(self._feed(start))
        return self._feeds[-1]

    def close(self) -> None:
        """End all feeds, and with them the processes that load for them."""
        while self._feeds:
            self._feeds.pop().close()

    def _feed(self, start: int) -> Iterator[list[Batch]]:
        device = self.world.device
        opened = {
            # A seed of its own: two streams over one set must not read the same rows.
            name: stream.open(start, [rows[name] for rows in self.micro], key(self.run.seed, name), device)
            for name, stream in self.streams.items()
        }
        try:
            while True:
                parts = {name: _next(name, batches) for name, batches in opened.items()}
                yield [
                    {name: tree_map(lambda t: t.to(device, non_blocking=True), part[i]) for name, part in parts.items()}
                    for i in range(len(self.micro))
                ]
        finally:
            for batches in opened.values():
                if hasattr(batches, "close"):
                    batches.close()


def _next(name: str, batches: Iterator[list[Batch]]) -> list[Batch]:
    try:
        return next(batches)
    except StopIteration:
        raise SettingsError(f"stream '{name}' ended: a stream goes on for ever, epoch after epoch") from None


def noise_block(micro_batches: Sequence[int], asked: int | None) -> int:
    """Rows per generator call for micro-batches of these sizes; see `Draw`.

    Raises:
        SettingsError: the block that is asked for does not divide one of them.
    """
    if asked is None:
        return next(block for block in (8, 4, 2, 1) if all(size % block == 0 for size in micro_batches))
    if any(size % asked for size in micro_batches):
        raise SettingsError(
            f"noise_block {asked} must divide every micro-batch {sorted(set(micro_batches))}: the noise of a row "
            f"may not depend on the split; choose a smaller noise_block, or other processes x grad_accum_steps"
        )
    return asked
