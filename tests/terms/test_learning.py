"""Every term teaches a student on real digits, resumes to the bit and leaves a plain student behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from visiondistill import Distiller
from visiondistill.augmentors import Affine, AffineRange, Hard, Mask
from visiondistill.data import Digits, Stream
from visiondistill.engine import Optim, Run, Stage, train
from visiondistill.eval import evaluate
from visiondistill.heads import DualHead
from visiondistill.models import Network, SmallConvNet
from visiondistill.teachers import Online
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
from visiondistill.terms.nkd import NKD
from visiondistill.terms.pkt import PKT
from visiondistill.terms.selectivity import NeuronSelectivity
from visiondistill.terms.similarity import SimilarityPreserving
from visiondistill.terms.vid import VID
from visiondistill.weighting import Aligned, Fixed, Trilateral

STEPS = 150
Parts = dict[str, Any]

METHODS: dict[str, Callable[[], Parts]] = {
    "kd": lambda: {"terms": {"kd": KL()}},
    "dkd": lambda: {"terms": {"dkd": DKD()}},
    "dist": lambda: {"terms": {"dist": DIST()}},
    "pld": lambda: {"terms": {"pld": PLD()}},
    "taid": lambda: {"terms": {"taid": TAID(steps=STEPS)}},
    "binary_kl": lambda: {"terms": {"bkl": BinaryKL(norm=False)}},
    "binary_kl_norm": lambda: {"terms": {"bkl": BinaryKL()}},
    "balanced": lambda: {"terms": {"bd": BalancedDivergence()}},
    "attention": lambda: {
        "terms": {"ce": CE(), "at": AttentionTransfer((0, 1), (0, 1))},
        "weighting": Fixed({"at": 100.0}),
    },
    "rkd": lambda: {"terms": {"ce": CE(), "rkd": RKD()}, "weighting": Fixed({"rkd": 0.1})},
    "nd": lambda: {"terms": {"ce": CE(), "nd": NormDirection()}},
    "sinkhorn": lambda: {"terms": {"kd": KL(), "sinkhorn": Sinkhorn()}, "weighting": Fixed({"sinkhorn": 0.01})},
    "hint": lambda: {"terms": {"ce": CE(), "hint": Hint()}},
    "fitnet": lambda: {"terms": {"ce": CE(), "hint": Hint(1, 1, "released")}},
    "ofa": lambda: {"terms": {"ce": CE(), "ofa": OFA([2, 3, 4], gamma=1.3)}},
    "review": lambda: {"terms": {"ce": CE(), "review": ReviewKD()}},
    "crd": lambda: {"terms": {"ce": CE(), "crd": CRD(width=32, negatives=256)}, "weighting": Fixed({"crd": 0.2})},
    "nkd": lambda: {"terms": {"ce": CE(), "nkd": NKD()}},
    "similarity": lambda: {"terms": {"ce": CE(), "sp": SimilarityPreserving()}, "weighting": Fixed({"sp": 100.0})},
    "selectivity": lambda: {"terms": {"ce": CE(), "nst": NeuronSelectivity()}, "weighting": Fixed({"nst": 10.0})},
    "pkt": lambda: {"terms": {"ce": CE(), "pkt": PKT()}, "weighting": Fixed({"pkt": 1000.0})},
    "vid": lambda: {"terms": {"ce": CE(), "vid": VID((0, 1), (0, 1))}, "weighting": Fixed({"vid": 0.1})},
    "dual_head": lambda: {
        "terms": {"ce": CE(), "bkl": BinaryKL(head="second")},
        "heads": DualHead(hidden=32),
        "weighting": Aligned({"bkl": 0.1}),
    },
    "both_heads": lambda: {
        "terms": {"ce": CE(), "kd": KL(2.0, head="second")},
        "heads": DualHead(hidden=None, inference="both"),
    },
    "trilateral": lambda: {"terms": {"ce": CE(), "kd": KL()}, "weighting": Trilateral(every=2)},
    "hard_range": lambda: {"terms": {"kd": KL()}, "augmentor": Hard(AffineRange(turn=10, shear=5), warmup=4)},
    "hard_affine": lambda: {"terms": {"kd": KL()}, "augmentor": Hard(Affine(10, 0.1, 1.1, 5, channels=1, width=4))},
    "hard_mask": lambda: {"terms": {"ce": CE(), "kd": KL()}, "augmentor": Hard(Mask(channels=1, width=4, cells=4))},
    "mutual": lambda: {
        "teacher": Online(conv(16, 32, 64)),
        "terms": {"ce": CE(), "kd": KL(1.0), "their_ce": Peer(CE()), "their_kd": Peer(KL(1.0))},
    },
}


def conv(*widths: int) -> Network:
    return Network(SmallConvNet(widths, "batch"), input_size=(1, 8, 8))


def run(folder: Path, parts: Parts, seed: int = 0, steps: int = STEPS, **settings: Any):
    torch.manual_seed(seed)
    method = Distiller(student=parts.pop("student", None) or conv(8, 12, 16), streams=digits(), **parts)
    optim = {"default": Optim(lr=1e-2, schedule="cosine")}
    own = {"output_dir": str(folder), "batch_size": 32, "progress": False, "device": "cpu"}
    return train([Stage(method, steps, optim)], Run(**own | settings))


def digits() -> dict[str, Stream]:
    return {"train": Stream(Digits("train"), 32), "val": Stream(Digits("val"), 32)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("teacher")
    network = run(folder / "run", {"student": conv(16, 32, 64), "terms": {"ce": CE()}}, steps=300).product
    assert evaluate(network.eval(), Digits("val")).accuracy > 0.95
    return network


@pytest.mark.parametrize("name", METHODS)
def test_a_student_learns(name: str, teacher: Network, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", {"teacher": teacher} | METHODS[name](), checkpoint_every=120)
    assert evaluate(whole.product.eval(), Digits("val")).accuracy > 0.75
    assert not whole.proofs["main"].waiting
    # From late on, with other initial weights: all that matters must come from the checkpoint.
    late = str(tmp_path / "whole" / "checkpoints" / "step_000000120")
    again = run(tmp_path / "again", {"teacher": teacher} | METHODS[name](), seed=1, resume=late)
    ours, theirs = whole.method.state_dict(), again.method.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_turn_is_one_graph(name: str, teacher: Network, tmp_path: Path) -> None:
    parts = {"teacher": teacher} | METHODS[name]()
    run(tmp_path / "run", parts, steps=8, proof_window=3, compile=True, compile_backend="eager")
