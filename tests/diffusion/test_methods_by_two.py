"""The methods train under two processes as under one; one pair of processes plays them all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import play, small_generator, small_streams
from torch import Tensor

import diffusion
from diffusion.critics import GAN
from diffusion.methods import DMD2, Denoising, GeneratorMethod, Regression
from diffusion.pairs import store_pairs


def dmd2(folder: Path, **options) -> DMD2:
    torch.manual_seed(1)
    return DMD2(small_generator(), streams=small_streams(), student_every=3, **options)


METHODS: dict[str, Callable[[Path], GeneratorMethod]] = {
    "dmd": lambda folder: dmd2(folder, regression=Regression(str(folder / "pairs"), 8), student_steps=2),
    "gan": lambda folder: dmd2(folder, gan=GAN(kind="relativistic", r1=1.0)),
    "alternating": lambda folder: dmd2(folder, gan=GAN(features="teacher", kind="hinge"), alternate=True),
    "denoising": lambda folder: Denoising(small_generator(), small_streams(), label_dropout=0.5),
}


def played(name: str, folder: Path, place: str) -> dict[str, Tensor]:
    method = METHODS[name](folder)
    play(method, folder / place / name, noise_block=2)
    return {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    store_pairs(small_generator(), 24, folder / "pairs", steps=3)
    return folder


@pytest.fixture(scope="module")
def by_two(folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    paths = [str(Path(diffusion.__file__).parents[1]), str(Path(__file__).parent)]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    running = []
    for rank in range(2):
        ranked = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(folder)]
            running.append(subprocess.Popen(command, env=ranked, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 300
    try:
        while any(each.poll() is None for each in running) and time.monotonic() < deadline:
            if any(each.poll() for each in running):
                break
            time.sleep(0.05)
    finally:
        for each in running:
            each.kill()
            each.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
    assert not any(each.returncode for each in running), logs
    return {name: [load_file(folder / f"{name}{rank}.safetensors") for rank in range(2)] for name in METHODS}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does(name: str, folder: Path, by_two: dict):
    first, second = by_two[name]
    assert apart(first, second) == 0
    assert apart(first, played(name, folder, "alone")) < 1e-10


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for each in METHODS:
        save_file(played(each, out, "together"), out / f"{each}{os.environ['RANK']}.safetensors")
    sys.stdout.flush()
    os._exit(0)  # taking the process group apart can last ten seconds
