"""Parts with turns of their own, and terms of the whole batch, train under two processes as under one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from distilling import apart, images, net, play, weights
from together import play_together, work
from torch import Tensor

from visiondistill import Distiller
from visiondistill.augmentors import AffineRange, Hard, Mask
from visiondistill.data import Stream
from visiondistill.heads import DualHead
from visiondistill.terms import CE, KL, RKD, TAID
from visiondistill.terms import pkt as pkt_module
from visiondistill.terms import similarity as similarity_module
from visiondistill.terms.pkt import PKT
from visiondistill.terms.similarity import SimilarityPreserving
from visiondistill.weighting import Fixed, Trilateral
from visiondistill.weighting import trilateral as trilateral_module


def built(terms: dict, **parts) -> Distiller:
    torch.manual_seed(0)
    streams = {"train": Stream(images(), 4), "val": Stream(images(), 8)}
    return Distiller(net(6, 9, seed=5), student=net(4, 5), terms=terms, streams=streams, **parts).double()


def trilateral() -> Distiller:
    """With what else needs the whole batch: a relation between rows, and a schedule that follows the loss."""
    terms = {"ce": CE(), "kd": TAID(steps=4), "rkd": RKD()}
    # A virtual step that is large enough for the mean of inner gradients to show.
    return built(terms, weighting=Trilateral(weights={"rkd": 0.1}, every=2, virtual_lr=0.1))


def hard() -> Distiller:
    """With thresholds between which the losses go back and forth."""
    return built({"kd": KL(2.0)}, augmentor=Hard(AffineRange(), stability=0.1, diversity=0.1, upper=1.05, lower=0.95))


def both() -> Distiller:
    terms = {"ce": CE(), "kd": KL(2.0, head="second")}
    return built(terms, heads=DualHead(hidden=None), weighting=Trilateral(), augmentor=Hard(Mask(channels=1)))


def similarity() -> Distiller:
    return built({"ce": CE(), "sp": SimilarityPreserving()})


def pkt() -> Distiller:
    return built({"ce": CE(), "pkt": PKT()}, weighting=Fixed({"pkt": 1000.0}))


METHODS: dict[str, Callable[[], Distiller]] = {
    "trilateral": trilateral,
    "hard": hard,
    "both": both,
    "similarity": similarity,
    "pkt": pkt,
}
LOCAL = "-local"
"""After a method's name: without what it does over processes, the mean of inner gradients or the gathering of rows."""
COLLECTIVE = ["trilateral", "similarity", "pkt"]
JOBS = [*METHODS, *(f"{name}{LOCAL}" for name in COLLECTIVE)]


def played(name: str, folder: Path) -> dict[str, Tensor]:
    method = METHODS[name.removesuffix(LOCAL)]()
    with ExitStack() as stack:
        if name.endswith(LOCAL):
            stack.enter_context(mock.patch.object(trilateral_module, "mean_across", lambda x: x))
            for module in (similarity_module, pkt_module):
                stack.enter_context(mock.patch.object(module, "gather_across", lambda x: x))
        play(method, folder / name, noise_block=2)
    return {name: tensor.contiguous() for name, tensor in weights(method).items()}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    return play_together(__file__, tmp_path_factory.mktemp("two"), JOBS)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does(name: str, by_two: dict, tmp_path: Path) -> None:
    first, second = by_two[name]
    assert apart(first, second) == 0
    assert apart(first, played(name, tmp_path)) < 1e-10


@pytest.mark.parametrize("name", COLLECTIVE)
def test_equality_would_miss_no_forgotten_collective(name: str, by_two: dict) -> None:
    assert apart(by_two[name][0], by_two[f"{name}{LOCAL}"][0]) > 1e-4


if __name__ == "__main__":
    work(JOBS, played)
