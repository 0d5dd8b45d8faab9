"""Heads on features: which maps they take, and that no logit is constant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion.critics import GAN, Discriminator, as_maps


def kernels(discriminator: Discriminator) -> list[tuple]:
    return [(m.kernel_size, m.stride) for m in discriminator.heads[0] if isinstance(m, nn.Conv2d)]


def test_on_maps_of_8_and_32_it_is_the_head_of_dmd2s_release():
    halving, whole, last = ((4, 4), (2, 2)), ((4, 4), (1, 1)), ((1, 1), (1, 1))
    assert kernels(Discriminator([(1, 128, 8, 8)])) == [halving, whole, last]
    assert kernels(Discriminator([(1, 128, 32, 32)])) == [halving] * 3 + [whole, last]
    assert kernels(Discriminator([(1, 8, 1, 64)])) == [((1, 4), (1, 2))] * 4 + [((1, 4), (1, 1)), last]
    norms = [m for m in Discriminator([(1, 768, 8, 8)]).heads[0] if isinstance(m, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32, 32]


@pytest.mark.parametrize("channels", [4, 6, 8, 16, 32, 33, 37, 64])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 4), (7, 9), (1, 64)])
def test_logits_depend_on_features_whatever_the_map(channels: int, size: tuple[int, int]):
    """Group norm with one element per group gives a constant: no gradient to anything below it."""
    torch.manual_seed(0)
    features = torch.randn(5, channels, *size, requires_grad=True)
    logits = Discriminator([features.shape])([features], 5)
    assert logits.shape == (5, 1)
    assert logits.std() > 1e-3
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    assert (gradient.flatten(1).abs().amax(1) > 1e-6).all()


def test_tokens_vectors_and_frames_are_maps():
    assert as_maps(torch.zeros(2, 16, 7)).shape == (2, 7, 4, 4)
    assert as_maps(torch.zeros(2, 6, 7)).shape == (2, 7, 1, 6)
    assert as_maps(torch.zeros(2, 7)).shape == (2, 7, 1, 1)
    assert as_maps(torch.zeros(2, 3, 7, 4, 5)).shape == (6, 7, 4, 5)
    tokens = torch.randn(1, 4, 2)
    assert torch.equal(as_maps(tokens)[0, :, 1, 0], tokens[0, 2]), "row by row"
    with pytest.raises(ValueError, match="2 to 5 dimensions"):
        as_maps(torch.zeros(3))


@pytest.mark.parametrize("folded", [True, False])
def test_every_frame_and_every_tap_is_a_head(folded: bool):
    video, tokens = torch.randn(2, 3, 8, 4, 4), torch.randn(2, 9, 12)
    first = video.flatten(0, 1) if folded else video
    discriminator = Discriminator([(3, 8, 4, 4) if folded else (1, 3, 8, 4, 4), (1, 9, 12)])
    logits = discriminator([first, tokens], 2)
    assert logits.shape == (2, 4)
    alone = discriminator.heads[0](video[1]).flatten()
    torch.testing.assert_close(logits[1, :3], alone, msg="frames of one video stay together")


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="3 channels"):
        Discriminator([(1, 3, 8, 8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "student"}, "'fake_score', 'teacher'"),
        ({"kind": "wasserstein"}, "'softplus', 'hinge', 'relativistic'"),
        ({"taps": "mid_block"}, "list"),
        ({"taps": []}, "at least one"),
        ({"r1": -1.0}, "negative"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GAN(**options)
