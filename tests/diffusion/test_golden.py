"""Twenty steps of DMD2 in double precision, against numbers that are kept: a refactoring changes none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.generator import Generator
from diffusion.methods.dmd2 import DMD2
from diffusion.toys.network import toy_denoiser
from visiondistill.engine import Optim, Run, Stage, train

CASES = {
    "dmd2": {"student_every": 5},
    "dmd2_alternating": {"student_every": 5, "alternate": True},
    "diff_instruct": {"student_every": 1, "normalize": False},
}


@pytest.mark.parametrize("name", CASES)
def test_golden_curve(name: str, tmp_path: Path, equals_golden: Callable[[str, dict[str, list[float]]], None]) -> None:
    teacher = toy_denoiser(width=8, depth=1).double()
    with torch.no_grad():
        for number, parameter in enumerate(teacher.parameters()):
            # By formula, so that golden numbers hang on no generator of initial weights.
            parameter.copy_(torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter) / 3)
    run = Run(str(tmp_path), batch_size=16, log_every=1, ema_decay=0.9, progress=False, device="cpu")
    optim = {"student": Optim("adam", lr=1e-2), "fake_score": Optim("adam", lr=2e-2, clip=1.0)}
    result = train([Stage(DMD2(Generator(teacher, (2,)), **CASES[name]), 20, optim)], run)
    terms = ("student/dmd", "critic/denoising")
    curve = {term: [line[term] for line in result.history if term in line] for term in terms}
    curve["average"] = [sum(tensor.sum().item() for tensor in result.ema.state_dict().values())]
    equals_golden(name, curve)
