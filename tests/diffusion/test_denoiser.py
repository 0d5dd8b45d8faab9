"""The adapter: views of a prediction, guidance, EDM preconditioning, compile and copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusion.denoiser import Denoiser, EDMPreconditioner, apply_guidance, edm_scalings, rescale_guidance
from diffusion.process import KINDS, EDMProcess, FlowProcess, VPProcess


class Conditional(nn.Module):
    """Nonlinear in the point, the time and a class label; remembers how it was called."""

    def __init__(self, dim=3, classes=4):
        super().__init__()
        self.layer, self.label = nn.Linear(dim, dim), nn.Embedding(classes + 1, dim)
        self.calls = []

    def forward(self, x, t, condition=None):
        if not torch.compiler.is_compiling():
            self.calls.append((tuple(x.shape), t.dtype, tuple(t.shape)))
        shift = 0 if condition is None else self.label(condition)
        return torch.tanh(self.layer(x) + t.unsqueeze(1) + shift)


@pytest.mark.parametrize("kind", KINDS)
def test_views_agree_with_the_process(kind):
    torch.manual_seed(0)
    process, x, t = FlowProcess(), torch.randn(5, 3), torch.rand(5) * 0.8 + 0.1
    denoiser = Denoiser(Conditional(), process, kind)
    prediction = denoiser(x, t)
    raw = denoiser.network(x, t)
    assert torch.equal(prediction.of(kind), raw)
    for name in KINDS:
        expected = process.convert(raw, x, t, kind, name)
        assert torch.equal(getattr(prediction, name), expected)


def test_a_plain_callable_is_a_network_too():
    denoiser = Denoiser(lambda x, t, condition: x * condition, FlowProcess(), "velocity")
    assert torch.equal(denoiser(torch.ones(2, 3), 0.5, 2.0).velocity, torch.full((2, 3), 2.0))
    assert list(denoiser.parameters()) == []


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.full((2,), 0.5), torch.full((2,), 0.5).double()])
def test_the_network_receives_one_float_time_per_row(t):
    network = Conditional()
    Denoiser(network, FlowProcess(), "velocity")(torch.randn(2, 3), t)
    assert network.calls == [((2, 3), torch.float32, (2,))]


def test_integer_times_stay_integers():
    seen = []
    Denoiser(lambda x, t, c: seen.append(t) or x, VPProcess.from_betas(), "eps")(torch.randn(2, 3), 999)
    assert seen[0].dtype == torch.int64
    assert seen[0].tolist() == [999, 999]


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_formula(batched):
    torch.manual_seed(0)
    denoiser = Denoiser(Conditional(), FlowProcess(), "velocity", batched_guidance=batched)
    x, t, c = torch.randn(3, 3), torch.rand(3), torch.tensor([0, 1, 2])
    null = torch.full_like(c, 4)
    got = denoiser(x, t, c, guidance_scale=3.0, null_condition=null).velocity
    cond, uncond = denoiser(x, t, c).velocity, denoiser(x, t, null).velocity
    torch.testing.assert_close(got, uncond + 3 * (cond - uncond))
    per_row = denoiser(x, t, c, guidance_scale=torch.tensor([1.0, 3.0, 0.0]), null_condition=null).velocity
    torch.testing.assert_close(per_row, torch.stack([cond[0], got[1], uncond[2]]))


def test_guidance_one_is_off_and_costs_one_pass():
    network = Conditional()
    denoiser = Denoiser(network, FlowProcess(), "velocity")
    denoiser(torch.randn(3, 3), torch.rand(3), torch.tensor([0, 1, 2]), guidance_scale=1.0)
    assert [shape for shape, *_ in network.calls] == [(3, 3)]


@pytest.mark.parametrize(("batched", "shapes"), [(True, [(6, 3)]), (False, [(3, 3), (3, 3)])])
def test_guidance_is_one_doubled_batch_or_two_calls(batched, shapes):
    network = Conditional()
    denoiser = Denoiser(network, FlowProcess(), "velocity", batched_guidance=batched)
    c = torch.tensor([0, 1, 2])
    denoiser(torch.randn(3, 3), torch.rand(3), c, guidance_scale=2.0, null_condition=c)
    assert [shape for shape, *_ in network.calls] == shapes


def test_doubled_batch_takes_a_nest_of_conditions():
    def network(x, t, c):
        return x + c["text"] + c["size"][0]

    one = {"text": torch.ones(2, 3), "size": [torch.ones(2, 3)]}
    null = {"text": torch.zeros(2, 3), "size": [torch.zeros(2, 3)]}
    got = Denoiser(network, FlowProcess(), "x0")(torch.zeros(2, 3), 0.5, one, guidance_scale=2.0, null_condition=null)
    assert torch.equal(got.x0, torch.full((2, 3), 4.0))


def test_guidance_without_a_null_condition_is_an_error():
    with pytest.raises(ValueError, match="null_condition"):
        Denoiser(Conditional(), FlowProcess(), "x0")(torch.randn(1, 3), 0.5, guidance_scale=2.0)


def test_guidance_commutes_with_conversion():
    """All kinds are affine in each other, so it does not matter in which one guides."""
    torch.manual_seed(0)
    process, x, t = FlowProcess(), torch.randn(4, 3).double(), torch.rand(4).double() * 0.8 + 0.1
    u, c = torch.randn(2, 4, 3).double()
    for kind in KINDS:
        branches = [process.convert(p, x, t, "velocity", kind) for p in (u, c)]
        back = process.convert(apply_guidance(branches, [4.5]), x, t, kind, "velocity")
        torch.testing.assert_close(back, apply_guidance([u, c], [4.5]))


def test_several_guidance_branches():
    b0, b1, b2 = torch.randn(3, 2, 5)
    torch.testing.assert_close(apply_guidance([b0, b1, b2], [4.0, 2.0]), b0 + 4 * (b1 - b0) + 2 * (b2 - b1))
    torch.testing.assert_close(apply_guidance([b0, b1, b2], [1.0, 1.0]), b2)
    for branches, scales in (([b0, b1], [1.0, 2.0]), ([b0], [])):
        with pytest.raises(ValueError, match="scales"):
            apply_guidance(branches, scales)


def test_guidance_of_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    u, c = torch.randn(2, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    got = apply_guidance([u, c], [7.5])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (u.float() + 7.5 * (c.float() - u.float())).bfloat16())


def linear(x, t, condition):
    """x * condition: guided by s from a null condition n, it is x * (n + s*(condition - n))."""
    return x * condition.reshape(-1, *(1,) * (x.ndim - 1))


NULL, TOLD = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 2.0, 3.0])
GUIDED = NULL + 3 * (TOLD - NULL)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [3.0, torch.full((3,), 3.0)])
def test_guidance_acts_in_its_interval_alone_sample_by_sample(batched, scale):
    denoiser = Denoiser(linear, EDMProcess(), "x0", batched_guidance=batched)
    x = torch.randn(3, 2, 4, 4)
    guide = {"guidance_scale": scale, "guidance_interval": (0.3, 5.0), "null_condition": NULL}
    told, all_of_it = (factor.reshape(3, 1, 1, 1) * x for factor in (TOLD, GUIDED))
    got = denoiser(x, torch.tensor([0.29, 1.0, 5.1]), TOLD, **guide).x0
    assert torch.equal(got[::2], told[::2]), "outside the conditional prediction, to the bit"
    torch.testing.assert_close(got[1], all_of_it[1])
    # Both ends belong to it, though float32 has neither 0.3 nor this other number.
    ends = denoiser(x, torch.tensor([0.3, 5.0, 4.999]).double(), TOLD, **guide).x0
    torch.testing.assert_close(ends, all_of_it)
    for t, expected in ((0.1, told), (2.0, all_of_it)):
        torch.testing.assert_close(denoiser(x, t, TOLD, **guide).x0, expected)


def test_an_interval_on_a_table_holds_its_integer_times():
    denoiser = Denoiser(linear, VPProcess.from_betas(), "eps")
    guide = {"guidance_scale": 3.0, "guidance_interval": (100, 700), "null_condition": NULL}
    got = denoiser(torch.ones(3, 2), torch.tensor([99, 100, 700]), TOLD, **guide).eps
    torch.testing.assert_close(got[:, 0], torch.stack([TOLD[0], GUIDED[1], GUIDED[2]]))


def test_guidance_acts_in_its_interval_alone_frame_by_frame():
    denoiser, x = Denoiser(linear, FlowProcess(), "velocity"), torch.randn(3, 2, 1, 4, 4)
    t = torch.tensor([[0.1, 0.5], [0.5, 0.9], [0.5, 0.6]])
    acts = torch.tensor([[False, True], [True, False], [True, True]])
    guide = {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.8), "null_condition": NULL}
    factor = torch.where(acts, GUIDED[:, None], TOLD[:, None])
    torch.testing.assert_close(denoiser(x, t, TOLD, **guide).velocity, factor[:, :, None, None, None] * x)
    # A linear network's guided frames have its conditional frames' shape: rescaled by 1, they are these.
    rescaled = denoiser(x, t, TOLD, **guide, guidance_rescale=1.0).velocity
    torch.testing.assert_close(rescaled, TOLD.reshape(3, 1, 1, 1, 1) * x)


def test_rescaled_guidance_is_the_papers_formula():
    torch.manual_seed(0)
    denoiser = Denoiser(Conditional(), FlowProcess(), "velocity")
    x, t, c = torch.randn(3, 3), torch.rand(3), torch.tensor([0, 1, 2])
    guide = {"guidance_scale": 6.0, "null_condition": torch.full_like(c, 4)}
    plain, cond = denoiser(x, t, c, **guide).velocity, denoiser(x, t, c).velocity
    assert torch.equal(denoiser(x, t, c, **guide, guidance_rescale=0.0).velocity, plain)
    whole, part = (denoiser(x, t, c, **guide, guidance_rescale=phi).velocity for phi in (1.0, 0.7))
    torch.testing.assert_close(whole.std(1), cond.std(1))
    torch.testing.assert_close(whole, plain * (cond.std(1) / plain.std(1))[:, None])
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * plain)
    assert not torch.allclose(part, plain, rtol=0.05)


def test_samples_have_one_contrast_and_frames_of_their_own_times_each_their_own():
    torch.manual_seed(0)
    guided, cond = (
        torch.randn(2, 3, 4, 2, 2) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1),
        torch.randn(2, 3, 4, 2, 2),
    )
    for leading in (1, 2):
        got = rescale_guidance(guided, cond, 1.0, leading=leading)
        torch.testing.assert_close(got.flatten(leading).std(leading), cond.flatten(leading).std(leading))
    denoiser = Denoiser(lambda x, t, c: torch.where(c.reshape(-1, 1, 1, 1, 1) > 0, cond, guided), FlowProcess(), "x0")
    guide = {"guidance_scale": 0.0, "guidance_rescale": 1.0, "null_condition": torch.zeros(2)}
    denoiser.batched_guidance = False
    for t, leading in ((torch.full((2,), 0.5), 1), (torch.full((2, 3), 0.5), 2)):
        got = denoiser(guided, t, torch.ones(2), **guide).x0
        torch.testing.assert_close(got, rescale_guidance(guided, cond, 1.0, leading=leading))


def test_rescaling_is_in_the_networks_own_space_and_in_float32():
    torch.manual_seed(0)
    u, c = (torch.randn(2, 64) for _ in range(2))
    denoiser = Denoiser(lambda x, t, told: torch.where(told[:, None] > 0, c, u).to(x), FlowProcess(), "eps")
    denoiser.batched_guidance = False
    guide = {"guidance_scale": 4.0, "guidance_rescale": 0.7, "null_condition": torch.zeros(2)}
    value = denoiser(torch.randn(2, 64), 0.5, torch.ones(2), **guide).eps
    torch.testing.assert_close(value, rescale_guidance(apply_guidance([u, c], [4.0]), c, 0.7))
    u, c = u.bfloat16().float(), c.bfloat16().float()
    got = denoiser(torch.randn(2, 64).bfloat16(), 0.5, torch.ones(2), **guide).value
    assert torch.equal(got, rescale_guidance(apply_guidance([u, c], [4.0]), c, 0.7).bfloat16())


def test_a_network_that_says_nothing_yet_is_rescaled_to_nothing():
    got = rescale_guidance(torch.zeros(2, 4), torch.zeros(2, 4), 0.7)
    assert torch.equal(got, torch.zeros(2, 4))


def test_at_scale_one_there_is_nothing_to_restrict_or_rescale():
    network = Conditional()
    denoiser = Denoiser(network, FlowProcess(), "velocity")
    x, t, c = torch.randn(3, 3), torch.rand(3), torch.tensor([0, 1, 2])
    got = denoiser(x, t, c, guidance_scale=1.0, guidance_interval=(0.2, 0.4), guidance_rescale=0.7).velocity
    assert [shape for shape, *_ in network.calls] == [(3, 3)]
    assert torch.equal(got, denoiser(x, t, c).velocity)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval=\[0\.8, 0\.2\] is not allowed.*from 0 to 1"),
        ({"guidance_interval": (0.2, 5.0)}, r"guidance_interval=\[0\.2, 5\.0\] is not allowed.*FlowProcess"),
        ({"guidance_interval": (-0.1, 0.5)}, r"guidance_interval"),
        ({"guidance_rescale": 1.1}, r"guidance_rescale=1\.1 is not allowed: from 0"),
        ({"guidance_rescale": -0.1}, r"guidance_rescale=-0\.1 is not allowed"),
    ],
)
def test_guidance_that_cannot_be_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        Denoiser(linear, FlowProcess(), "velocity")(torch.ones(3, 2), 0.5, TOLD, null_condition=NULL, **wrong)


def test_edm_scalings_limits():
    sigma = torch.tensor([1e-4, 0.5, 1e4], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma)
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_skip[0], torch.tensor(1.0).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(c_out[2], torch.tensor(0.5).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    # Unit variance in and out, for data of variance sigma_data^2: EDM's own derivation.
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), torch.ones(3).double())
    torch.testing.assert_close(c_out**2, (1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2)
    assert edm_scalings(torch.zeros(1))[3].isfinite()


def test_edm_boundary_form_is_the_identity_at_sigma_min():
    sigma = torch.tensor([0.002], dtype=torch.float64)
    c_skip, c_out, *_ = edm_scalings(sigma, sigma_min=0.002)
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0)


def preconditioned():
    torch.manual_seed(0)
    return Denoiser(EDMPreconditioner(Conditional()), EDMProcess(), "x0")


def test_edm_preconditioned_denoiser_leaves_clean_samples_alone():
    x = torch.randn(4, 3)
    torch.testing.assert_close(preconditioned()(x, 1e-6).x0, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_predictions_have_the_samples_dtype(dtype):
    denoiser = preconditioned().to(dtype)
    x = torch.randn(4, 3).to(dtype)
    network = denoiser.network.network
    network.forward = lambda x, c_noise, condition: network.layer(x) + c_noise.to(x.dtype).unsqueeze(1)
    for kind in KINDS:
        assert denoiser(x, torch.rand(4) + 0.1).of(kind).dtype == dtype


def test_a_copy_is_equal_and_independent():
    denoiser = preconditioned()
    twin = copy.deepcopy(denoiser)
    x, t = torch.randn(4, 3), torch.rand(4) + 0.1
    assert torch.equal(denoiser(x, t).x0, twin(x, t).x0)
    before = denoiser(x, t).x0
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert torch.equal(denoiser(x, t).x0, before)
    assert not torch.equal(twin(x, t).x0, before)


@pytest.mark.parametrize("process", [EDMProcess(), FlowProcess(3.0, 1000), VPProcess.from_betas()], ids=repr)
def test_compiles_to_one_graph(process):
    torch.manual_seed(0)
    denoiser = Denoiser(Conditional(), process, "v")
    t = torch.tensor([100, 700]) if isinstance(process, VPProcess) else torch.tensor([0.2, 0.7]).double()

    def loss(x, t, c):
        noised = process.noised(x, torch.ones_like(x), t)
        guided = denoiser(noised.x_t, t, c, guidance_scale=2.0, null_condition=torch.full_like(c, 4))
        return (guided.x0 - x).square().mean() + guided.score.mean() + noised.of("eps").mean()

    x, c = torch.randn(2, 3), torch.tensor([0, 1])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, c), loss(x, t, c))


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        Denoiser(Conditional(), FlowProcess(), "flow")
