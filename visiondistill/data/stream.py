"""Endless global batches, addressed by step number."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visiondistill.data.order import EpochOrder
from visiondistill.data.origin import Origin
from visiondistill.data.samples import Samples, collate
from visiondistill.data.tensors import TensorData
from visiondistill.engine.method import Batch

AHEAD_STEPS, AHEAD_BYTES = 64, 2**26
"""In-memory batches are gathered for so many steps (or bytes) at once: one step then costs a few views."""


class Stream:
    """Epoch permutations laid end to end and cut into equal global batches.

    Every sample comes exactly once per epoch, shapes are static, a batch may span two epochs, and
    what step `s` reads depends on the seed, `s` and the rows alone: not on the number of workers,
    nor on what was read before. Batches hold "image" (floating in [0, 1], `[B, C, H, W]`), "label"
    (int64 `[B]`, -1 for none), "index" (the sample's number in `data`, int64 `[B]`) and whatever
    else the data set gives.

    Args:
        data: `TensorData`, or any map-style data set of dicts or `(image, label)` pairs.
        batch_size: rows of the global batch, over all processes and micro-batches.
        workers: processes that load samples; 0 loads in this one. Not used for `TensorData`
            without a transform, which is indexed on its device.
        transform: of each image before it becomes a tensor, in the workers; see `Samples`.
        labelled_fraction: share of samples that have a label. None reads it from the data (its
            labels in memory, or `targets`), and takes 1 where that is impossible.
        contents: a digest of images and labels, where it is known: a resumed run must have the same.
        origin: where the samples stood in the training set as it was given; None: each in its own row.

    Raises:
        ValueError: an empty set, batch_size < 1, workers < 0, or a fraction outside [0, 1].
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        workers: int = 0,
        transform: Callable | None = None,
        labelled_fraction: float | None = None,
        contents: str | None = None,
        origin: Origin | None = None,
    ) -> None:
        name = type(data).__name__
        if len(data) == 0:
            raise ValueError(f"the data set {name} is empty")
        if batch_size < 1 or workers < 0:
            raise ValueError(f"need batch_size >= 1 and workers >= 0, got {batch_size} and {workers}")
        self.data, self.batch_size, self.workers, self.transform = data, batch_size, workers, transform
        self.samples, self.contents = len(data), contents
        self.origin = Origin.of(len(data)) if origin is None else origin
        self.labelled_fraction = _labelled_fraction(data) if labelled_fraction is None else labelled_fraction
        if not 0 <= self.labelled_fraction <= 1:
            raise ValueError(f"labelled_fraction must be in [0, 1], got {self.labelled_fraction} for {name}")

    def open(
        self, start: int, rows: Sequence[tuple[int, int]], seed: int, device: torch.device | None = None
    ) -> Iterator[list[Batch]]:
        """Yield, for step `start`, `start + 1`, ..., one batch per `(low, high)` of `rows`.

        Args:
            start: first step.
            rows: parts of each step's global batch, `0 <= low < high <= batch_size`.
            seed: decides orders and samples.
            device: where `TensorData` lives from now on; None leaves it where it is.
        """
        if self.batch_size > len(self.data):
            warnings.warn(
                f"batch_size={self.batch_size} is larger than the {len(self.data)} samples of "
                f"{type(self.data).__name__}: every batch spans epochs and repeats samples",
                stacklevel=2,
            )
        order = EpochOrder(len(self.data), seed)
        if isinstance(self.data, TensorData) and self.transform is None:
            if device is not None and device != self.data.device:
                self.data.to(device)
            return self._from_memory(start, rows, order)
        return self._from_workers(start, rows, order)

    def _from_memory(self, start: int, rows: Sequence[tuple[int, int]], order: EpochOrder) -> Iterator[list[Batch]]:
        ahead = max(1, min(AHEAD_STEPS, AHEAD_BYTES // self._bytes_per_step(rows)))
        for first in itertools.count(start, ahead):
            places = order.between(first * self.batch_size, (first + ahead) * self.batch_size)
            steps = places.view(ahead, self.batch_size)
            columns = [self._gather(steps[:, low:high]) for low, high in rows]
            for step in range(ahead):
                yield [{name: parts[step] for name, parts in column.items()} for column in columns]

    def _gather(self, index: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """`[steps, R]` indices to one view per step of each column."""
        flat = index.reshape(-1)
        if self.data.device.type == "cuda":
            flat = flat.pin_memory().to(self.data.device, non_blocking=True)
        rows = self.data.rows(flat)
        return {name: column.view(*index.shape, *column.shape[1:]).unbind() for name, column in rows.items()}

    def _bytes_per_step(self, rows: Sequence[tuple[int, int]]) -> int:
        row = self.data.rows(torch.zeros(1, dtype=torch.int64, device=self.data.device))
        return sum(column.nbytes for column in row.values()) * sum(high - low for low, high in rows)

    def _from_workers(self, start: int, rows: Sequence[tuple[int, int]], order: EpochOrder) -> Iterator[list[Batch]]:
        samples = Samples(self.data, self.transform, order.seed)
        batches = _read(_loader(samples, _Places(order, self.batch_size, start, rows), self.workers))
        while True:
            yield [next(batches) for _ in rows]


def in_order(data: Any, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every sample once, in order, in batches of `batch_size` (the last one smaller): for evaluation.

    Batches as of `Stream`; no generator of the process is touched.
    """
    length = len(data)
    if isinstance(data, TensorData):
        for first in range(0, length, batch_size):
            yield data.rows(torch.arange(first, min(first + batch_size, length), device=data.device))
        return
    places = [
        [(0, index) for index in range(first, min(first + batch_size, length))]
        for first in range(0, length, batch_size)
    ]
    yield from _read(_loader(Samples(data, None, seed=0), places, workers))


def _read(loader: DataLoader) -> Iterator[Batch]:
    batches = iter(loader)
    try:
        yield from batches
    finally:
        # At once, whatever still refers to them: workers that ignore signals would keep the interpreter from its exit.
        if loader.num_workers:
            batches._shutdown_workers()


class _Places:
    """Endless lists of (epoch, index): one list per micro-batch, step after step."""

    def __init__(self, order: EpochOrder, batch_size: int, start: int, rows: Sequence[tuple[int, int]]) -> None:
        self.order, self.batch_size, self.start, self.rows = order, batch_size, start, rows

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        length = self.order.length
        for step in itertools.count(self.start):
            for low, high in self.rows:
                places = range(step * self.batch_size + low, step * self.batch_size + high)
                index = self.order.between(places.start, places.stop).tolist()
                yield [(place // length, i) for place, i in zip(places, index, strict=True)]


def _loader(samples: Samples, places: Any, workers: int) -> DataLoader:
    return DataLoader(
        samples,
        batch_sampler=places,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_server() if workers else None,
        worker_init_fn=_follow_main,
        # Without one of its own the loader draws from the default generator.
        generator=torch.Generator(),
    )


def _server() -> Any:
    """Workers are forked from a process that has done nothing but import, where the system can do that.

    A fork of this one would copy thread pools and signal handlers that do not survive it; a fresh
    interpreter for each would import torch again.
    """
    if "forkserver" not in torch.multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker  # neither is there on every system

    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Ctrl-C and a scheduler's SIGTERM reach the whole group. What is blocked here stays so in the server and its
    # workers; in this process it only waits. A server that ended would take the workers along.
    resource_tracker.ensure_running()  # unblocks them, so that it must be there before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _follow_main(worker: int) -> None:
    """Live exactly as long as the main process, which decides when to end."""
    # The loader's own watch is for the parent, here the server, which in turn stays for its workers: neither
    # would notice a main process that was killed.
    main = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


def _labelled_fraction(data: Any) -> float:
    if isinstance(data, TensorData):
        return data.labelled_fraction
    targets = getattr(data, "targets", None)
    return 1.0 if targets is None else (torch.as_tensor(targets) >= 0).double().mean().item()
