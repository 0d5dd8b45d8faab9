"""The five axes compose: what can be mixed trains, resumes and leaves a plain student; the rest is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from visiondistill import Distiller
from visiondistill.augmentors import AffineRange, Augment, Hard, Mask, Mix
from visiondistill.data import Digits, Stream
from visiondistill.engine import Optim, Result, Run, Stage, train
from visiondistill.engine.errors import SettingsError
from visiondistill.export import export
from visiondistill.heads import DualHead, SingleHead
from visiondistill.models import Network, SmallConvNet
from visiondistill.teachers import Ensemble, Online
from visiondistill.terms import (
    CE,
    CRD,
    DIST,
    DKD,
    KL,
    OFA,
    PLD,
    RKD,
    TAID,
    AttentionTransfer,
    BalancedDivergence,
    BinaryKL,
    NormDirection,
    Peer,
    ReviewKD,
    Sinkhorn,
)
from visiondistill.weighting import Aligned, Fixed, Ramp, Trilateral

STEPS, MIDDLE = 10, 5
"""Every turn runs three times and more; the resume is in mid-cycle of those that are due at every second step."""

Make = Callable[[], Any]
TERMS: dict[str, Make] = {
    "dkd": lambda: {"dkd": DKD()},
    "pld": lambda: {"pld": PLD()},
    "dist": lambda: {"dist": DIST()},
    "taid": lambda: {"taid": TAID(steps=STEPS)},
    "ofa": lambda: {"ofa": OFA([2, 3, 4], gamma=1.3)},
    "nd": lambda: {"nd": NormDirection()},
    "attention": lambda: {"at": AttentionTransfer((0, 1), (0, 1))},
    "review": lambda: {"review": ReviewKD()},
    "rkd": lambda: {"rkd": RKD()},
    "crd": lambda: {"crd": CRD(width=16, negatives=64)},
    "sinkhorn": lambda: {"sinkhorn": Sinkhorn()},
    "balanced": lambda: {"bd": BalancedDivergence()},
    "logits": lambda: {"logits": BinaryKL()},
}
"""Each beside `ce` and `kd`."""
WEIGHTINGS: dict[str, Make] = {
    "fixed": lambda: Fixed({"ce": 0.5}),
    "ramp": lambda: Fixed({"kd": Ramp(0.1, 1.0, steps=5)}),
    "aligned": Aligned,
    "trilateral": lambda: Trilateral(every=2),
}
HEADS: dict[str, Make] = {"one": SingleHead, "two": lambda: DualHead(hidden=8)}
AUGMENTORS: dict[str, Make] = {
    "none": lambda: None,
    "flip": lambda: Augment(flip=0.5, shift=1),
    "mix": lambda: Mix(10),
    "hard range": lambda: Hard(AffineRange(turn=10, shear=5), warmup=2),
    "hard mask": lambda: Hard(Mask(channels=1, width=4, cells=4), warmup=2),
}
TEACHERS: dict[str, Make] = {
    "network": lambda: conv(9, 10, 11),
    "ensemble": lambda: Ensemble({"a": conv(9, 10, 11), "b": conv(7, 8)}),
    "online": lambda: Online(conv(9, 10, 11)),
}
Choice = tuple[str, str, str, str, str]
FLAGSHIP: Choice = ("ofa", "trilateral", "two", "hard range", "network")
EVERY: list[Choice] = list(itertools.product(TERMS, WEIGHTINGS, HEADS, AUGMENTORS, TEACHERS))


def conv(*widths: int) -> Network:
    return Network(SmallConvNet(widths, "batch"), input_size=(1, 8, 8))


def composed(choice: Choice, seed: int = 0) -> Distiller:
    term, weighting, heads, augmentor, teacher = choice
    torch.manual_seed(0)
    source = TEACHERS[teacher]()
    torch.manual_seed(seed)
    terms = {"ce": CE(), "kd": KL()} | TERMS[term]()
    if heads == "two":
        terms["second"] = KL(2.0, head="second")
    if teacher == "online":
        terms["theirs"] = Peer(CE())
    return Distiller(
        source,
        student=conv(5, 6, 7),
        terms=terms,
        streams={split: Stream(Digits(split), 16) for split in ("train", "val")},
        weighting=WEIGHTINGS[weighting](),
        heads=HEADS[heads](),
        augmentor=AUGMENTORS[augmentor](),
    )


def possible(choices: Sequence[Choice]) -> list[Choice]:
    """Those that are not refused; any other error ends the collection."""
    found = []
    for choice in choices:
        try:
            composed(choice)
        except SettingsError:
            continue
        found.append(choice)
    return found


SAMPLE = [FLAGSHIP, *possible(EVERY[::23])]
"""Evenly over all of them: 23 shares no factor with the lengths of the axes."""


def test_enough_of_them_are_tried() -> None:
    assert len(SAMPLE) >= 40
    for axis, choices in enumerate((TERMS, WEIGHTINGS, HEADS, AUGMENTORS, TEACHERS)):
        assert {choice[axis] for choice in SAMPLE} == set(choices), "every choice of every axis is among them"


def play(method: Distiller, folder: Path, **settings: Any) -> Result:
    own = {"output_dir": str(folder), "batch_size": 16, "progress": False, "device": "cpu", "proof_window": 3}
    own |= {"checkpoint_every": MIDDLE, "keep": 5, "log_every": STEPS}
    optim = {"default": Optim(lr=3e-3, clip=1.0)}
    return train([Stage(method, STEPS, optim)], Run(**own | settings))


def assert_plain(product: nn.Module) -> None:
    assert product.state_dict().keys() == conv(5, 6, 7).state_dict().keys()


@pytest.mark.parametrize("choice", SAMPLE, ids=" + ".join)
def test_a_composition_trains_resumes_and_leaves_a_plain_student(choice: Choice, tmp_path: Path) -> None:
    whole = play(composed(choice), tmp_path / "whole")
    proof = whole.proofs["main"]
    assert {name.partition("/")[0] for name in proof.reached} == {turn.name for turn in whole.method.turns()}
    assert_plain(whole.product)
    middle = str(tmp_path / "whole" / "checkpoints" / f"step_{MIDDLE:09d}")
    again = play(composed(choice, seed=1), tmp_path / "again", resume=middle)
    ours, theirs = whole.method.state_dict(), again.method.state_dict()
    frozen = {name for name in ours if name.startswith("frozen.")}
    assert [name for name in ours if name not in frozen and not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("choice", SAMPLE, ids=" + ".join)
def test_a_composition_is_one_graph_per_turn_and_exports(choice: Choice, tmp_path: Path) -> None:
    result = play(composed(choice), tmp_path / "run", compile=True, compile_backend="eager")
    names = [str(number) for number in range(10)]
    exported = export(result.product.eval(), tmp_path / "export", classes=names, input_size=(1, 8, 8))
    assert exported.format == "program"


def test_the_flagship_exports(tmp_path: Path) -> None:
    product = composed(FLAGSHIP).product().eval()
    exported = export(product, tmp_path / "export", classes=[str(n) for n in range(10)], input_size=(1, 8, 8))
    assert exported.largest_difference["program"] < 1e-5


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("dkd", "fixed", "one", "mix", "network"), "the augmentor mixes"),
        (("nd", "fixed", "one", "none", "online"), "stays as it is"),
        (("attention", "fixed", "one", "none", "ensemble"), "has no features|no stages|features"),
    ],
)
def test_impossible_mixes_are_refused_by_name(choice: Choice, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        composed(choice)
