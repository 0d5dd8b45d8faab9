"""What to change when memory runs out: the error of a failed allocation, with the settings that take less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from visiondistill.engine.across import process_count
from visiondistill.engine.errors import OutOfMemory
from visiondistill.engine.settings import Optim, Run, Stage
from visiondistill.engine.shares import noise_block

SAID = (
    *("DefaultCPUAllocator: not enough memory", "DefaultCPUAllocator: can't allocate memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""What torch says of a failed allocation where it has no class of its own for it."""


@contextmanager
def memory_advice(run: Run, stages: Sequence[Stage]) -> Iterator[None]:
    """Turn a failed allocation in the block into an error that names the settings that take less, and their values.

    Raises:
        OutOfMemory: in place of what torch or Python raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not failed_allocation(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        lines = [f"out of memory: {first}", "What takes less, from the mildest on:"]
        lines += [f"  - {line}" for line in advice(run, stages)]
        raise OutOfMemory("\n".join([*lines, _last_checkpoint(run)])) from error


def failed_allocation(error: BaseException) -> bool:
    """Whether the error says that there was no memory left, on the device or the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in SAID)


def advice(run: Run, stages: Sequence[Stage]) -> list[str]:
    """A line for each setting that can take less memory than it does now, at least three."""
    rows, finer = _rows(run), _finer(run)
    lines = []
    if finer is not None:
        lines.append(
            f"run.grad_accum_steps={run.grad_accum_steps}: {finer * run.grad_accum_steps} holds {rows // finer} images "
            f"at a time in place of {rows}, with the same result within rounding"
        )
    if run.mixed_precision == "no":
        lines.append("run.mixed_precision=no: bf16 halves what a network keeps for its backward pass")
    if not run.compile:
        lines.append("run.compile=false: true fuses operations, and what passes between them is then not kept")
    if run.ema_decay is not None:
        lines.append(f"run.ema_decay={run.ema_decay}: null keeps no second copy of the student")
    lines.append(f"run.batch_size={run.batch_size}: a smaller one, with a learning rate to fit")
    optimizers = {optim.name for stage in stages for optim in stage.optim.values()} or {Optim().name}
    for name in sorted(optimizers - {"sgd", "momentum"}):
        lines.append(f"optim.*.name={name}: momentum keeps one number for each weight, adam and adamw keep two")
    return [*lines, "the images' size: half the side takes about a quarter", "the networks: smaller ones"]


def _rows(run: Run) -> int:
    """Images that a process holds at a time."""
    return run.batch_size // (process_count() * run.grad_accum_steps)


def _finer(run: Run) -> int | None:
    """The fewest parts into which each micro-batch can be cut; also for a continued run, whose noise block stays."""
    rows = _rows(run)
    block = noise_block([rows], run.noise_block)
    return next((n for n in range(2, rows + 1) if rows % n == 0 and rows // n % block == 0), None)


def _last_checkpoint(run: Run) -> str:
    found = sorted((Path(run.output_dir) / "checkpoints").glob("step_*"))
    if not found:
        return "No checkpoint had been written yet."
    only = "" if _finer(run) is None else "; of all these settings, run.grad_accum_steps alone may be another then"
    return f"The last checkpoint is whole: {found[-1]}. run.resume=auto continues from it{only}."
