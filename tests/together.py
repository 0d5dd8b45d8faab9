"""A test file that plays its cases under several processes at once, started as `torchrun` would.

The test calls `play_together(__file__, ...)`, and the file, run as a program, calls `work`. Importing
torch costs seconds, so that one set of processes plays all cases of a file in sequence.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def play_together(
    script: str, folder: Path, names: Iterable[str], processes: int = 2, timeout: float = 300.0
) -> dict[str, list[Tensors]]:
    """Run `script` as a program in each process; gives what `work` kept of each name, by rank."""
    run_together(script, folder, processes, timeout)
    return {name: [load_file(_kept(folder, name, rank)) for rank in range(processes)] for name in names}


def run_together(script: str, folder: Path, processes: int = 2, timeout: float = 300.0) -> None:
    """Run `script` as a program, given `folder`, in each process; all are gone afterwards.

    Raises:
        RuntimeError: a process failed or `timeout` seconds have passed, with the ends of all logs.
    """
    tests = Path(__file__).parent
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests))),
    }
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    running = []
    for rank, path in enumerate(logs):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with path.open("w") as log:
            command = [sys.executable, script, str(folder)]
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        _wait(running, time.monotonic() + timeout)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        codes = [process.returncode for process in running]
        raise RuntimeError("\n".join([f"exit codes {codes}:", *(path.read_text()[-3000:] for path in logs)]))


def work(names: Iterable[str], played: Callable[[str, Path], Tensors]) -> NoReturn:
    """What one of the processes does: `played(name, folder)` for each name, whose tensors are kept."""
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name in names:
        save_file(played(name, folder), _kept(folder, name, rank))
    sys.stdout.flush()
    os._exit(0)  # taking the process group apart can last ten seconds


def _wait(running: Sequence[subprocess.Popen], deadline: float) -> None:
    """Until all have ended well, one has failed, or the deadline has passed."""
    while any(process.poll() is None for process in running):
        if any(process.poll() for process in running) or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _kept(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}{rank}.safetensors"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
