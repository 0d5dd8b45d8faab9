"""Noise paths: closed forms, derivatives, conversions there and back, grids and laws of time."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from diffusion.process import (
    KINDS,
    ContinuousVPProcess,
    EDMProcess,
    FlowProcess,
    TimeLaw,
    TrigProcess,
    VPProcess,
    block_times,
    karras_sigmas,
    shift_time,
    time_quantile,
)

CONTINUOUS = {
    "edm": EDMProcess(),
    "flow": FlowProcess(),
    "trig": TrigProcess(),
    "trig_half": TrigProcess(sigma_data=0.5),
    "cosine": ContinuousVPProcess("cosine"),
    "linear": ContinuousVPProcess("linear"),
}
EVERY = {**CONTINUOUS, "vp": VPProcess.from_betas()}


def interior(process, n=7):
    """Times of the path away from both ends."""
    share = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return process.min_t + share * (process.max_t - process.min_t)


def sample(n=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(n, 3, 2, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_primes_are_the_derivatives(name):
    process = CONTINUOUS[name]
    t = interior(process).requires_grad_(True)
    for value, prime in ((process.alpha, process.alpha_prime), (process.sigma, process.sigma_prime)):
        v = value(t)
        expected = torch.autograd.grad(v.sum(), t)[0] if v.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(prime(t).detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["trig", "cosine", "linear", "vp"])
def test_variance_is_preserved(name):
    process = EVERY[name]
    t = interior(process)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("name", EVERY)
def test_time_at_inverts_half_log_snr(name):
    process = EVERY[name]
    t = interior(process)
    torch.testing.assert_close(process.time_at(process.half_log_snr(t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_half_log_snr_is_the_log_ratio(name):
    process = EVERY[name]
    t = interior(process)
    torch.testing.assert_close(process.half_log_snr(t).exp(), process.alpha(t) / process.sigma(t))


@pytest.mark.parametrize("name", EVERY)
def test_conversions_of_a_true_sample_give_what_it_was_made_of(name):
    """Every kind of every kind, against the definitions, not against itself."""
    process = EVERY[name]
    x0, noise = sample()
    t = interior(process)
    noised = process.noised(x0, noise, t)
    kinds = [k for k in KINDS if not (k == "velocity" and isinstance(process, VPProcess))]
    a, s = (c.reshape(-1, 1, 1) for c in (process.alpha(t), process.sigma(t)))
    truth = {"x0": x0, "eps": noise, "v": a * noise - s * x0, "score": -noise / s}
    if "velocity" in kinds:
        da, ds = (c.reshape(-1, 1, 1) for c in (process.alpha_prime(t), process.sigma_prime(t)))
        truth["velocity"] = da * x0 + ds * noise
    for source in kinds:
        torch.testing.assert_close(noised.of(source), truth[source], rtol=1e-9, atol=1e-9)
        for target in kinds:
            got = process.convert(truth[source], noised.x_t, t, source, target)
            torch.testing.assert_close(got, truth[target], rtol=1e-7, atol=1e-7, msg=f"{source}->{target}")


@pytest.mark.parametrize("name", EVERY)
def test_conversion_there_and_back_for_any_prediction(name):
    """A network's output need not be consistent with x_t; conversions must invert each other all the same."""
    process = EVERY[name]
    x_t, p = sample()
    t = interior(process)
    for source in KINDS:
        for target in KINDS:
            if "velocity" in (source, target) and name == "vp":
                continue
            there = process.convert(p, x_t, t, source, target)
            back = process.convert(there, x_t, t, target, source)
            torch.testing.assert_close(back, p, rtol=1e-6, atol=1e-6, msg=f"{source}->{target}")


def test_equal_kinds_return_the_input_itself():
    p = torch.randn(2, 3)
    assert FlowProcess().convert(p, torch.randn(2, 3), 0.5, "v", "v") is p


def test_flow_velocity_at_pure_noise_gives_x0_exactly():
    """x0 = z - v at t=1; through eps it would be 0/0."""
    x0, noise = sample(2)
    process = FlowProcess()
    got = process.convert(noise - x0, noise, 1.0, "velocity", "x0")
    torch.testing.assert_close(got, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_conversions_stay_finite_at_both_ends_of_the_flow(source, target, end):
    x_t, p = sample(2, torch.float32)
    assert FlowProcess().convert(p, x_t, end, source, target).isfinite().all()


def test_conversion_is_differentiable_in_prediction_and_sample():
    process = TrigProcess(0.5)
    x_t, p = (x.requires_grad_(True) for x in sample(2))
    t = torch.tensor([0.4, 1.1], dtype=torch.float64)
    for source in KINDS:
        for target in set(KINDS) - {source}:
            convert = partial(process.convert, t=t, source=source, target=target)
            assert torch.autograd.gradcheck(convert, (p, x_t))


def test_conversion_works_in_float64_inside():
    """eps -> x0 at the last step of the SD table amplifies an error by 14.6; the result has x_t's dtype."""
    process = VPProcess.from_betas()
    x0, noise = sample(4, torch.float32)
    t = torch.full((4,), 999)
    x_t64 = process.add_noise(x0.double(), noise.double(), t)
    got = process.convert(noise, x_t64.float(), t, "eps", "x0")
    assert got.dtype == torch.float32
    a, s = float(process.alpha(999)), float(process.sigma(999))
    assert abs(s / a - 14.6) < 0.05
    expected = (x_t64.float().double() - s * noise.double()) / a
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_samples_keep_their_dtype(dtype):
    x0, noise = sample(3, dtype)
    process = EDMProcess()
    t = torch.tensor([0.1, 1.0, 10.0])
    assert process.add_noise(x0, noise, t).dtype == dtype
    assert process.velocity(x0, noise, t).dtype == dtype
    assert process.start(noise).dtype == dtype
    for kind in KINDS:
        assert process.noised(x0, noise, t).of(kind).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((64,), 0.3).double()])
def test_half_precision_is_rounded_once(dtype, t):
    x0, noise = sample(64, dtype)
    process = FlowProcess()
    for made in (process.add_noise, process.velocity, lambda *at: process.noised(*at).of("v")):
        assert torch.equal(made(x0, noise, t), made(x0.float(), noise.float(), t).to(dtype))


def test_times_of_every_form_lead_the_batch():
    process = FlowProcess()
    video, noise = (torch.randn(2, 5, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    t = torch.rand(2, 5, dtype=torch.float64)
    whole = process.add_noise(video, noise, t)
    for b in range(2):
        for f in range(5):
            one = process.add_noise(video[b, f], noise[b, f], float(t[b, f]))
            torch.testing.assert_close(whole[b, f], one, rtol=1e-12, atol=1e-12)
    per_sample = process.add_noise(video, noise, t[:, 0])
    torch.testing.assert_close(per_sample[1, 4], process.add_noise(video[1, 4], noise[1, 4], t[1, 0]))
    torch.testing.assert_close(
        process.add_noise(video, noise, 0.25), process.add_noise(video, noise, torch.tensor(0.25))
    )


def test_a_time_with_more_dimensions_than_the_sample_is_refused():
    with pytest.raises(ValueError, match="cannot lead"):
        FlowProcess().add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", EVERY)
def test_linear_path_there_and_back(name):
    process = EVERY[name]
    x0, noise = sample()
    t = interior(process)
    x_t = process.add_noise(x0, noise, t)
    x, tau = process.to_linear(x_t, t)
    torch.testing.assert_close(x, FlowProcess().add_noise(x0, noise, tau), rtol=1e-9, atol=1e-9)
    back, when = process.from_linear(x, tau)
    torch.testing.assert_close(when, t, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back, x_t, rtol=1e-8, atol=1e-8)


def test_unknown_kinds_name_the_allowed_ones():
    with pytest.raises(ValueError, match="'x0', 'eps', 'v', 'velocity', 'score'"):
        FlowProcess().convert(torch.zeros(1), torch.zeros(1), 0.5, "flow", "x0")


def test_the_discrete_path_has_no_velocity():
    process = VPProcess.from_betas()
    for call in (process.alpha_prime, process.sigma_prime):
        with pytest.raises(NotImplementedError, match="continuous time"):
            call(3)
    with pytest.raises(NotImplementedError):
        process.convert(torch.zeros(1, 2), torch.zeros(1, 2), 3, "velocity", "x0")


def test_discrete_indices_hit_the_table_and_negative_times_the_clean_end():
    process = VPProcess.from_betas()
    t = torch.arange(1000)
    torch.testing.assert_close(process.alpha(t) ** 2, process.alphas_cumprod, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - process.alphas_cumprod, rtol=1e-12, atol=0)
    assert (process.alpha(-1), process.sigma(-1)) == (1, 0)
    final = VPProcess(process.alphas_cumprod, final_alpha_cumprod=float(process.alphas_cumprod[0]))
    torch.testing.assert_close(final.alpha(-1), final.alpha(0))


def test_discrete_times_between_indices_interpolate_the_log_ratio():
    process = VPProcess.from_betas()
    middle = process.half_log_snr(torch.tensor([10.5, 600.25], dtype=torch.float64))
    left, right = process.half_log_snr(torch.tensor([10, 600])), process.half_log_snr(torch.tensor([11, 601]))
    share = torch.tensor([0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(middle, (1 - share) * left + share * right)


def test_discrete_time_at_is_clamped_to_the_table():
    process = VPProcess.from_betas()
    assert process.time_at(float("inf")) == 0
    assert process.time_at(-50.0) == 999


def test_zero_terminal_snr_stays_exact():
    table = torch.linspace(0.99, 0.0, 10, dtype=torch.float64)
    process = VPProcess(table)
    assert process.alpha(9) == 0
    assert process.sigma(9) == 1
    torch.testing.assert_close(process.alpha(8) ** 2, table[8])
    assert process.time_at(float("-inf")) == 9
    assert process.time_at(process.half_log_snr(8)) == 8


@pytest.mark.parametrize("table", [torch.tensor([0.5, 0.9]), torch.tensor([1.5, 0.9]), torch.rand(2, 2)])
def test_bad_tables_are_refused(table):
    with pytest.raises(ValueError, match="falling"):
        VPProcess(table)


def test_flow_snaps_to_the_nearest_entry_of_the_shifted_table():
    process = FlowProcess(shift=5.0, num_steps=4)
    table = shift_time(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64), 5.0)
    torch.testing.assert_close(process.sigma(table), table, rtol=0, atol=0)
    assert process.sigma(0.0) == table[-1]
    assert process.sigma(float(table[1]) - 0.01) == table[1]
    assert process.alpha(0.0) == 1 - table[-1]
    assert FlowProcess(shift=5.0).sigma(0.3) == pytest.approx(0.3)


def test_shift_time_closed_form():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shift_time(t, 1.0), t)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t)
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6.0))


def test_karras_grid():
    sigmas = karras_sigmas(5, 0.01, 10.0, 3.0)
    even = torch.linspace(0.01 ** (1 / 3), 10 ** (1 / 3), 5, dtype=torch.float64)
    torch.testing.assert_close(sigmas ** (1 / 3), even)
    assert sigmas[0] == pytest.approx(0.01)
    assert karras_sigmas(1)[0] == pytest.approx(80.0)


def test_timesteps_are_descending_and_end_clean():
    flow = FlowProcess(shift=3.0)
    torch.testing.assert_close(flow.timesteps(4), shift_time(torch.linspace(1, 0, 5, dtype=torch.float64), 3.0))
    edm = EDMProcess()
    torch.testing.assert_close(edm.timesteps(3), torch.cat([karras_sigmas(3).flip(0), torch.zeros(1)]))
    assert len(edm.timesteps(3, final_zero=False)) == 3
    assert edm.timesteps(1).tolist() == pytest.approx([80.0, 0.0])
    for process in EVERY.values():
        grid = process.timesteps(6).double()
        assert len(grid) == 7
        assert (grid.diff() < 0).all()


def test_discrete_spacings_are_those_of_diffusers():
    vp = VPProcess.from_betas()
    assert vp.timesteps(4).tolist() == [750, 500, 250, 0, -1]
    assert vp.timesteps(4, steps_offset=1).tolist() == [751, 501, 251, 1, -1]
    assert vp.timesteps(4, "trailing").tolist() == [999, 749, 499, 249, -1]
    assert vp.timesteps(4, "linspace").tolist() == [999, 666, 333, 0, -1]
    with pytest.raises(ValueError, match="'leading', 'trailing', 'linspace'"):
        vp.timesteps(4, "even")


def test_student_times():
    assert VPProcess.from_betas().student_times(4).tolist() == [999, 749, 499, 249, -1]
    assert VPProcess.from_betas().student_times(3).tolist() == [999, 666, 333, -1]
    assert VPProcess.from_betas().student_times(7)[:-1].numel() == 7, "7 does not divide 1000; the release gives 8"
    table = karras_sigmas(1000)
    assert EDMProcess().student_times(4).tolist() == pytest.approx([*table[[999, 749, 499, 249]].tolist(), 0.0])
    torch.testing.assert_close(
        FlowProcess(5.0).student_times(4), torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        TrigProcess().student_times(2), torch.tensor([math.pi / 2, math.pi / 4, 0.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("name", EVERY)
def test_no_steps_at_all_is_refused(name):
    for grid in (EVERY[name].timesteps, EVERY[name].student_times):
        with pytest.raises(ValueError, match="n=0"):
            grid(0)


def test_sampling_starts_where_the_teacher_was_sampled():
    noise = torch.randn(3, 2)
    torch.testing.assert_close(EDMProcess().start(noise), 80 * noise)
    torch.testing.assert_close(EDMProcess().start(noise, 2.5), 2.5 * noise)
    assert torch.equal(FlowProcess().start(noise), noise)
    assert torch.equal(VPProcess.from_betas().start(noise, 399), noise), "SD takes unit noise at any step"


U = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "law",
    [
        {"law": "uniform", "low": 0.2, "high": 0.7},
        {"law": "karras", "low": 0.002, "high": 80.0},
        {"law": "lognormal", "mean": -1.2, "std": 1.2, "low": 0.01, "high": 5.0},
        {"law": "logit_normal", "low": 0.1, "high": 0.9, "mean": 1.0},
        {"law": "shifted", "low": 0.02, "high": 0.98, "shift": 5.0},
    ],
    ids=lambda law: law["law"],
)
def test_laws_are_increasing_and_stay_in_their_range(law):
    t = time_quantile(U.sort().values, **law)
    assert t.dtype == torch.float64
    assert (t.diff() >= 0).all()
    assert t.min() >= law["low"]
    assert t.max() <= law["high"]
    assert torch.equal(TimeLaw(**law)(U), time_quantile(U, **law))


def test_index_law_reaches_both_ends_and_nothing_else():
    ends = torch.tensor([0.0, 1 - 2**-24], dtype=torch.float32)
    assert time_quantile(ends, "index", low=20, high=980).tolist() == [20, 980]
    counts = torch.bincount(time_quantile(U, "index", low=3, high=6))
    assert counts[:3].sum() == 0
    assert (counts[3:] - 1000).abs().max() < 120, "4000 draws over 4 indices; sd 27"


def test_lognormal_quantiles_and_truncation():
    u = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)
    torch.testing.assert_close(
        time_quantile(u, "lognormal", mean=-1.2, std=1.2).log(), torch.tensor([-1.2, 0.0], dtype=torch.float64)
    )
    truncated = time_quantile(U, "lognormal", mean=0.0, std=1.0, low=1.0)
    assert truncated.median().log() == pytest.approx(0.6745, abs=0.05), "the upper half's median"


def test_shifted_law_clamps_after_the_shift():
    t = time_quantile(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64), "shifted", low=0.02, high=0.98, shift=8.0)
    assert t[0] == pytest.approx(8 * 0.02 / 1.14)
    assert t[1] == 0.98


def test_unknown_laws_and_reversed_ranges_are_refused():
    with pytest.raises(ValueError, match="'logit_normal'"):
        time_quantile(U, "normal")
    with pytest.raises(ValueError, match="exceed"):
        TimeLaw("uniform", low=2.0)


def test_own_laws_cover_dmd2s_range():
    vp = VPProcess.from_betas().time_law(0.02, 0.98)
    assert (vp(torch.zeros(1)).item(), vp(torch.ones(1) - 2**-24).item()) == (20, 980)
    full = VPProcess.from_betas().time_law()
    assert (full(torch.zeros(1)).item(), full(torch.ones(1) - 2**-24).item()) == (0, 999)
    edm = EDMProcess().time_law(20 / 999, 980 / 999)
    table = karras_sigmas(1000)
    assert edm(torch.zeros(1)).item() == pytest.approx(table[20].item())
    assert edm(torch.ones(1)).item() == pytest.approx(table[980].item())
    flow = FlowProcess(shift=5.0).time_law(0.02, 0.98)(U)
    assert flow.min() >= 0.02
    assert flow.max() == 0.98


def test_block_times():
    t = torch.arange(7.0).repeat(2, 1)
    assert block_times(t, 3)[0].tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert block_times(t, 3, independent_first=True)[1].tolist() == [0, 1, 1, 1, 4, 4, 4]
    assert torch.equal(block_times(t, 1), t)
    with pytest.raises(ValueError, match="block_size"):
        block_times(t, 0)
