"""Twenty steps of every method in double precision, against numbers that are kept: refactoring changes none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from terms.test_learning import METHODS, conv
from torch import nn

from visiondistill import Distiller
from visiondistill.data import Digits, Stream
from visiondistill.engine import Optim, Run, Stage, train

STEPS = 20


def by_formula(module: nn.Module) -> nn.Module:
    """Matrices and kernels by formula, so that no golden number hangs on a generator of initial weights."""
    with torch.no_grad():
        for place, weight in enumerate(module.parameters()):
            if weight.ndim > 1:
                phase = torch.arange(weight.numel(), dtype=torch.float64) * 0.7 + place
                weight.copy_(phase.sin().view(weight.shape) * (2 / weight[0].numel()) ** 0.5)
    return module


def digits(split: str) -> Digits:
    data = Digits(split)
    data.columns["image"] = data.columns["image"].double()
    return data


@pytest.mark.parametrize("name", METHODS)
def test_golden_curve(name: str, tmp_path: Path, equals_golden: Callable[[str, dict[str, list[float]]], None]) -> None:
    torch.manual_seed(0)
    parts = {"teacher": by_formula(conv(16, 32, 64))} | METHODS[name]()
    streams = {split: Stream(digits(split), 16) for split in ("train", "val")}
    method = Distiller(student=conv(6, 8, 10), streams=streams, **parts).double()
    by_formula(method.players)
    run = Run(str(tmp_path), 16, log_every=1, ema_decay=0.9, proof_window=0, progress=False, device="cpu")
    result = train([Stage(method, STEPS, {"default": Optim("adamw", lr=1e-2, schedule="cosine", warmup=3)})], run)
    terms = sorted({term for line in result.history for term in line if "/" in term and not term.startswith("lr/")})
    curve = {term: [line[term] for line in result.history if term in line] for term in terms}
    curve["average"] = [sum(t.sum().item() for t in result.ema.state_dict().values() if t.is_floating_point())]
    equals_golden(f"method_{name}", curve)
