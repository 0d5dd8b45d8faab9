"""Which device and which of how many processes this is; `accelerate launch` decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from visiondistill.engine.errors import SettingsError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, value: bool) -> bool:
        """True on every process as soon as it is true on one (a host-side collective)."""
        if self.size == 1:
            return value
        flag = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def union(self, items: list[str]) -> list[str]:
        """What any process holds, without repetitions (a host-side collective)."""
        parts = [items] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, items)
        return list(dict.fromkeys(item for part in parts for item in part))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def launch(device: str = "auto") -> World:
    """Join the process group that `accelerate launch` or `torchrun` announced, if any.

    Raises:
        SettingsError: a device was asked for that is not here.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device={device!r}: no CUDA device is available here; use device='cpu' or 'auto'")
    cpu = device == "cpu" or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        return World(state.device, state.process_index, state.num_processes)
    if cpu:
        return World(torch.device("cpu"))
    chosen = torch.device("cuda" if device == "auto" else device)
    return World(torch.device("cuda", chosen.index or 0))


@contextmanager
def repeatable() -> Iterator[None]:
    """Kernels that give the same bits every time; where CUDA has none, torch warns and names the operation."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Read by cuBLAS when its first product on the device is asked for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
