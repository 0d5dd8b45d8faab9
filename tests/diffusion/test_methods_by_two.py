"""The methods train under two processes as under one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import play, small_generator, small_streams
from together import play_together, work
from torch import Tensor

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
    return play_together(__file__, folder, METHODS)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does(name: str, folder: Path, by_two: dict):
    first, second = by_two[name]
    assert apart(first, second) == 0
    assert apart(first, played(name, folder, "alone")) < 1e-10


if __name__ == "__main__":
    work(METHODS, lambda name, folder: played(name, folder, "together"))
