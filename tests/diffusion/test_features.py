"""Taps: what inner modules of a denoiser give on the way to its prediction."""

from __future__ import annotations

import copy

import pytest
import torch
from small import SHAPE, small_denoiser
from torch import nn

from diffusion.denoiser import Denoiser
from diffusion.process import FlowProcess

X, T = torch.randn(3, *SHAPE, dtype=torch.float64), torch.tensor([0.3, 1.0, 5.0])


def test_features_are_the_modules_outputs_and_the_prediction_is_the_usual_one():
    denoiser, seen = small_denoiser(), {}
    unet = denoiser.network.network
    for name in ("encoder", "mid_block"):
        getattr(unet, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    prediction, (mid, encoded) = denoiser.features(X, T, taps=["mid_block", "network.encoder"])
    assert torch.equal(mid, seen["mid_block"])
    assert torch.equal(encoded, seen["encoder"])
    assert torch.equal(prediction.x0, denoiser(X, T).x0)


def test_a_tap_is_idle_in_all_other_calls_and_keeps_nothing():
    denoiser = small_denoiser()
    for _ in range(3):
        denoiser.features(X, T, taps=["mid_block"])
    denoiser(X, T)
    assert len(denoiser.network.network.mid_block._forward_hooks) == 1
    assert denoiser._taps["mid_block"].seen is None


def test_a_tap_closes_after_an_error():
    denoiser = small_denoiser()
    denoiser.features(X, T, taps=["mid_block"])
    with pytest.raises(IndexError):
        denoiser.features(X, T, torch.tensor([99, 0, 0]), taps=["mid_block"])
    denoiser(X, T)
    assert denoiser._taps["mid_block"].seen is None


def test_a_copy_has_features_of_its_own():
    denoiser = small_denoiser()
    _, (before,) = denoiser.features(X, T, taps=["mid_block"])
    other = copy.deepcopy(denoiser)
    nn.init.zeros_(other.network.network.mid_block.weight)
    nn.init.zeros_(other.network.network.mid_block.bias)
    _, (theirs,) = other.features(X, T, taps=["mid_block"])
    assert theirs.abs().max() == 0
    assert torch.equal(denoiser.features(X, T, taps=["mid_block"])[1][0], before)


def test_of_a_tuple_it_is_the_first():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Pair()

        def forward(self, x, t, condition):
            return self.block(x)[1]

    _, (feature,) = Denoiser(Net(), FlowProcess(), "eps").features(X, 0.5, taps=["block"])
    assert torch.equal(feature, X + 1)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "own": nn.Identity()}) for _ in range(2))

    def forward(self, x, t, condition):
        return x


@pytest.mark.parametrize(
    ("tap", "message"),
    [("conv", "write out one of up.conv, down.conv"), ("mid_block", "no module of Nested; it has up, up.conv")],
)
def test_taps_that_name_no_module_or_several_are_refused(tap, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(Nested(), FlowProcess(), "x0").features(X, 0.5, taps=[tap])


def test_a_bare_function_has_no_modules():
    with pytest.raises(ValueError, match="it has none"):
        Denoiser(lambda x, t, c: x, FlowProcess(), "x0").features(X, 0.5, taps=["mid_block"])
