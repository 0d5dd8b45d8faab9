"""Defects of other suites, by whole paths, runs and imports; those of single parts are tested with the parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import SHAPE, play, small_generator, small_streams, weights
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.critics import GAN
from diffusion.methods import DMD2
from diffusion.process import (
    KINDS,
    ContinuousVPProcess,
    EDMProcess,
    FlowProcess,
    Process,
    TrigProcess,
    VPProcess,
    block_times,
    time_quantile,
)

PROCESSES = [
    EDMProcess(),
    FlowProcess(shift=3.0),
    FlowProcess(num_steps=10),
    TrigProcess(0.5),
    ContinuousVPProcess(),
    ContinuousVPProcess("linear"),
    VPProcess.from_betas(),
]


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, if the tensors lay on one."""

    WAITS = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "nonzero"})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"the host waits for {name}"
        return func(*args, **kwargs or {})


def test_the_guard_sees_a_host_that_waits():
    for wait in (lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: (x > 0).nonzero()):
        with pytest.raises(AssertionError, match="the host waits"), NoWaiting():
            wait(torch.ones(3))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_no_call_of_a_path_waits_for_the_device(process: Process):
    """A peer asserts on every time that it is given."""
    x, noise, u = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE), torch.rand(4)
    law, kinds = process.time_law(0.02, 0.98), KINDS
    if isinstance(process, VPProcess):
        kinds = tuple(kind for kind in KINDS if kind != "velocity")
    with NoWaiting():
        t = law(u)
        sample = process.noised(x, noise, t)
        for source in kinds:
            sample.of(source)
            for target in kinds:
                process.convert(x, sample.x_t, t, source, target)
        process.time_at(process.half_log_snr(t))
        process.from_linear(*process.to_linear(sample.x_t, t))
        process.start(noise, t)


@pytest.mark.parametrize("law", ["uniform", "index", "karras", "lognormal", "logit_normal", "shifted"])
def test_no_law_of_time_waits_for_the_device(law: str):
    u = torch.rand(4, 6)
    with NoWaiting():
        block_times(time_quantile(u, law))


def test_the_average_moves_with_the_student_alone(tmp_path: Path):
    """A peer's moves in the critic's steps too, where it forgets with a student that stands still."""
    method = DMD2(small_generator(), streams=small_streams(), gan=GAN(generator_weight=1.0), student_every=4)
    before = weights(method.product())
    result = play(method, tmp_path, steps=4, ema_decay=0.75, proof_window=0)
    moved = weights(result.method.product())
    assert not torch.equal(moved, before)
    averaged = weights(getattr(result.ema, "denoiser", result.ema))
    torch.testing.assert_close(averaged, 0.75 * before + 0.25 * moved, rtol=1e-5, atol=1e-7)


def test_importing_the_package_imports_nothing_optional():
    """A peer's method imports trackers, video readers and every network."""
    code = (
        "import sys, diffusion.losses, diffusion.process, diffusion.samplers, diffusion.schedules, diffusion.methods\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "peft", "wandb", "timm", "matplotlib", "torch_fidelity"}
