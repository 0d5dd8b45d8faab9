"""The five axes compose: what can be mixed trains, resumes and leaves a plain student; the rest is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn.functional import one_hot

from visiondistill import Distiller
from visiondistill.augmentors import Affine, AffineRange, Augment, Hard, Mask, Mix
from visiondistill.data import Digits, Stream
from visiondistill.engine import Optim, Result, Run, Stage, train
from visiondistill.engine.errors import SettingsError
from visiondistill.export import export
from visiondistill.heads import DistilledHead, DualHead, SingleHead
from visiondistill.models import Network, SmallConvNet
from visiondistill.teachers import Ensemble, Online, Stored
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
    Hint,
    NormDirection,
    Peer,
    ReviewKD,
    Sinkhorn,
)
from visiondistill.terms.hard_label import HardLabel
from visiondistill.terms.nkd import NKD
from visiondistill.terms.pkt import PKT
from visiondistill.terms.similarity import SimilarityPreserving
from visiondistill.terms.vid import VID
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
    "hint": lambda: {"hint": Hint()},
    "nkd": lambda: {"nkd": NKD()},
    "similarity": lambda: {"sp": SimilarityPreserving()},
    "pkt": lambda: {"pkt": PKT()},
    "vid": lambda: {"vid": VID((0, 1), (0, 1))},
    "nd, dkd": lambda: {"nd": NormDirection(), "dkd": DKD()},
    "nd, dist": lambda: {"nd": NormDirection(), "dist": DIST()},
    "nd, review": lambda: {"nd": NormDirection(), "review": ReviewKD()},
}
"""Each beside `ce` and `kd`."""
WEIGHTINGS: dict[str, Make] = {
    "fixed": lambda: Fixed({"ce": 0.5}),
    "ramp": lambda: Fixed({"kd": Ramp(0.1, 1.0, steps=5)}),
    "aligned": Aligned,
    "trilateral": lambda: Trilateral(every=2),
}
HEADS: dict[str, Make] = {"one": SingleHead, "two": lambda: DualHead(hidden=8), "distilled": DistilledHead}
OF_A_HEAD: dict[str, Make] = {
    "one": dict,
    "two": lambda: {"second": BinaryKL(head="second")},
    "distilled": lambda: {"token": HardLabel(head="distilled")},
}
"""What teaches the other head, if there is one."""
AUGMENTORS: dict[str, Make] = {
    "none": lambda: None,
    "mirror": lambda: Augment(flip=0.5),
    "shift": lambda: Augment(flip=0.5, shift=1),
    "mix": lambda: Mix(10),
    "hard range": lambda: Hard(AffineRange(turn=10, shear=5), warmup=2),
    "hard affine": lambda: Hard(Affine(10, 0.1, 1.1, 5, channels=1, width=4), warmup=2),
    "hard mask": lambda: Hard(Mask(channels=1, width=4, cells=4), warmup=2),
}
TEACHERS: dict[str, Make] = {
    "network": lambda: conv(9, 10, 11),
    "ensemble": lambda: Ensemble({"a": conv(9, 10, 11), "b": conv(7, 8)}),
    "online": lambda: Online(conv(9, 10, 11)),
    "stored": lambda: Stored(answers()),
}


class Choice(NamedTuple):
    """One of each axis."""

    term: str
    weighting: str
    heads: str
    augmentor: str
    teacher: str


FLAGSHIP = Choice("ofa", "trilateral", "two", "hard range", "network")
EVERY = [Choice(*names) for names in itertools.product(TERMS, WEIGHTINGS, HEADS, AUGMENTORS, TEACHERS)]


def conv(*widths: int) -> Network:
    return Network(SmallConvNet(widths, "batch"), input_size=(1, 8, 8))


def vit() -> Network:
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 4, "num_heads": 2}
    return Network(VisionTransformerDistilled(**sizes, in_chans=1, num_classes=10), input_size=(1, 8, 8))


def student(heads: str) -> Network:
    return vit() if heads == "distilled" else conv(5, 6, 7)


@cache
def folder() -> TemporaryDirectory[str]:
    """Gone when the tests are."""
    return TemporaryDirectory()


@cache
def answers() -> str:
    """A file of logits of the training images and their mirror images, mostly right."""
    label = Digits("train").columns["label"]
    noise = torch.randn(2, len(label), 10, generator=torch.Generator().manual_seed(0))
    file = str(Path(folder().name) / "answers.safetensors")
    save_file({"train_logits": 4 * one_hot(label, 10) + noise}, file)
    return file


def composed(choice: Choice, seed: int = 0) -> Distiller:
    torch.manual_seed(0)
    source = TEACHERS[choice.teacher]()
    torch.manual_seed(seed)
    terms = {"ce": CE(), "kd": KL()} | TERMS[choice.term]() | OF_A_HEAD[choice.heads]()
    if choice.teacher == "online":
        terms["theirs"] = Peer(CE())
    return Distiller(
        source,
        student=student(choice.heads),
        terms=terms,
        streams={split: Stream(Digits(split), 16) for split in ("train", "val")},
        weighting=WEIGHTINGS[choice.weighting](),
        heads=HEADS[choice.heads](),
        augmentor=AUGMENTORS[choice.augmentor](),
    )


# Whatever else is refused fails the tests below.

ONE_LABEL = {"dkd", "pld", "crd", "balanced", "nkd", "nd, dkd"}
FEATURES = {"attention", "review", "rkd", "crd", "hint", "similarity", "pkt", "vid"}
MEANS = {"nd", "nd, dkd", "nd, dist", "nd, review"}
REASONS: list[tuple[str, Callable[[Choice], bool]]] = [
    (r"^term '\w+' needs one label per image", lambda c: c.augmentor in ("mix", "hard mask") and c.term in ONE_LABEL),
    ("^class means are of a teacher that stays as it is", lambda c: c.teacher == "online" and c.term in MEANS),
    ("^class means are of a teacher that stays", lambda c: c.teacher == "online" and c.weighting == "trilateral"),
    (r"^term '\w+': Ensemble has no features by", lambda c: c.teacher == "ensemble" and c.term in FEATURES | MEANS),
    (r"^term '\w+': Stored has no features, only", lambda c: c.teacher == "stored" and c.term in FEATURES | MEANS),
    ("^hard augmentations ask the teacher", lambda c: c.teacher == "stored" and c.augmentor.startswith("hard")),
    ("^'augmentor': Augment makes shift, and Stored", lambda c: c.teacher == "stored" and c.augmentor == "shift"),
    ("^'augmentor': Mix makes mix, and Stored", lambda c: c.teacher == "stored" and c.augmentor == "mix"),
]
"""What is said of a mix that cannot be, and which ones these are."""


def reasons(choice: Choice) -> list[str]:
    return [message for message, applies in REASONS if applies(choice)]


TRIED = EVERY[::73]
"""Evenly over all of them: 73 shares no factor with the lengths of the axes."""
SAMPLE = [FLAGSHIP, *(choice for choice in TRIED if not reasons(choice))]


def test_the_others_are_refused_and_say_why() -> None:
    for choice in TRIED:
        if reasons(choice):
            with pytest.raises(SettingsError, match="|".join(reasons(choice))):
                composed(choice)


def test_enough_of_them_are_tried() -> None:
    assert len(SAMPLE) >= 40
    assert all(any(applies(choice) for choice in TRIED) for _, applies in REASONS)
    for axis, choices in enumerate((TERMS, WEIGHTINGS, HEADS, AUGMENTORS, TEACHERS)):
        assert {choice[axis] for choice in SAMPLE} == set(choices), "every choice of every axis is among them"


def play(method: Distiller, folder: Path, **settings: Any) -> Result:
    own = {"output_dir": str(folder), "batch_size": 16, "progress": False, "device": "cpu", "proof_window": 3}
    own |= {"checkpoint_every": MIDDLE, "keep": 5, "log_every": STEPS}
    optim = {"default": Optim(lr=3e-3, clip=1.0)}
    return train([Stage(method, STEPS, optim)], Run(**own | settings))


def assert_plain(product: nn.Module, heads: str) -> None:
    assert product.state_dict().keys() == student(heads).state_dict().keys()


@pytest.mark.parametrize("choice", SAMPLE, ids=" + ".join)
def test_a_composition_trains_resumes_and_leaves_a_plain_student(choice: Choice, tmp_path: Path) -> None:
    whole = play(composed(choice), tmp_path / "whole")
    proof = whole.proofs["main"]
    assert {name.partition("/")[0] for name in proof.reached} == {turn.name for turn in whole.method.turns()}
    assert_plain(whole.product, choice.heads)
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
        (
            Choice("dkd", "fixed", "one", "mix", "network"),
            "^term 'dkd' needs one label per image, but the augmentor mix",
        ),
        (Choice("nd", "fixed", "one", "none", "online"), "^class means are of a teacher that stays as it is"),
        (Choice("attention", "fixed", "one", "none", "ensemble"), "^term 'at': Ensemble has no features by stage"),
    ],
)
def test_impossible_mixes_are_refused_by_name(choice: Choice, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        composed(choice)
