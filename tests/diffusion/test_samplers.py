"""Samplers against the exact flow of a Gaussian: orders of convergence, exact cases, noise bookkeeping."""

from __future__ import annotations

import pytest
import torch

from diffusion.process import ContinuousVPProcess, EDMProcess, FlowProcess, TrigProcess, VPProcess
from diffusion.samplers import (
    backward_simulation_times,
    ddim,
    ddim_invert,
    ddim_step,
    euler,
    flow_map,
    handover_index,
    heun,
    renoise,
    simulate_student_input,
)

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
STD = torch.tensor([1.0, 0.3], dtype=torch.float64)
PATHS = [EDMProcess(), FlowProcess(), TrigProcess(0.5), ContinuousVPProcess()]
VP = VPProcess.from_betas()


def moments(process, t):
    """Mean and standard deviation of x_t for x0 ~ N(MEAN, STD^2)."""
    alpha, sigma = process.alpha(t).unsqueeze(-1), process.sigma(t).unsqueeze(-1)
    return alpha * MEAN, ((alpha * STD) ** 2 + sigma**2).sqrt()


def exact_x0(process):
    """The exact denoiser of that Gaussian."""

    def model(x, t):
        alpha = process.alpha(t).unsqueeze(-1)
        mean, std = moments(process, t)
        return MEAN + alpha * STD**2 / std**2 * (x - mean)

    return model


def exact_map(process, x, t, r):
    """The probability flow from t to r in closed form: standardise at t, colour at r."""
    (mean_t, std_t), (mean_r, std_r) = moments(process, t), moments(process, r)
    return mean_r + std_r / std_t * (x - mean_t)


def as_kind(process, kind):
    x0 = exact_x0(process)
    return lambda x, t: process.convert(x0(x, t), x, t, "x0", kind)


def start(process, n=16):
    t = torch.tensor(0.9 * process.max_t if not isinstance(process, EDMProcess) else 5.0, dtype=torch.float64)
    end = torch.tensor(0.1 if not isinstance(process, EDMProcess) else 0.05, dtype=torch.float64)
    mean, std = moments(process, t)
    z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return mean + std * z, t, end


def error_of(sampler, process, steps, kind):
    x, t, end = start(process)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * (t - end) + end
    got = sampler(as_kind(process, kind), x, grid, process, prediction_type=kind)
    return (got - exact_map(process, x, t, end)).abs().max().item()


@pytest.mark.parametrize("process", PATHS, ids=repr)
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (ddim, 1), (heun, 2)])
def test_order_of_convergence(sampler, order, process):
    coarse, fine = error_of(sampler, process, 64, "x0"), error_of(sampler, process, 128, "x0")
    assert fine > 1e-9, "exact already: the ratio would say nothing"
    assert coarse / fine == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("sampler", [euler, ddim, heun])
def test_what_the_model_predicts_does_not_matter(sampler):
    process = FlowProcess()
    errors = [error_of(sampler, process, 16, kind) for kind in ("x0", "eps", "v", "velocity", "score")]
    assert max(errors) - min(errors) < 1e-10


def test_ddim_is_euler_where_time_is_sigma_over_alpha():
    """On the EDM path both are x + (r - t)*eps."""
    process = EDMProcess()
    x, t, end = start(process)
    grid = torch.linspace(1, 0, 9, dtype=torch.float64) * (t - end) + end
    model = as_kind(process, "eps")
    torch.testing.assert_close(
        ddim(model, x, grid, process), euler(model, x, grid, process, prediction_type="eps"), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("process", [*PATHS, VP], ids=repr)
def test_ddim_is_exact_for_a_point_mass(process):
    """Then x0 is constant and every grid lands on the same line."""
    point, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = process.add_noise(point, noise, process.max_t)
    got = ddim(lambda x, t: point, x, process.timesteps(3), process, prediction_type="x0")
    torch.testing.assert_close(got, point, rtol=1e-5, atol=1e-8)


def test_heun_is_euler_in_its_last_step():
    process, calls = EDMProcess(), []

    def model(x, t):
        calls.append(t[0].item())
        return exact_x0(process)(x, t)

    heun(model, torch.randn(2, 2).double(), process.timesteps(4), process, prediction_type="x0")
    assert len(calls) == 2 * 4 - 1, "EDM's NFE"
    assert 0.0 not in calls


def test_heun_mixes_clean_and_noisy_arrivals_by_row():
    process = FlowProcess()
    x, _, _ = start(process, 2)
    model = as_kind(process, "velocity")
    half = [torch.tensor([0.8, 0.8]).double(), torch.tensor([0.4, 0.0]).double()]
    got = heun(model, x, half, process)
    alone = [heun(model, x[i : i + 1], [h[i : i + 1] for h in half], process) for i in range(2)]
    torch.testing.assert_close(got, torch.cat(alone))


@pytest.mark.parametrize("sampler", [euler, heun, ddim, renoise])
def test_grids_of_every_form(sampler):
    process = FlowProcess()
    x, _, _ = start(process, 3)
    model = as_kind(process, "x0")
    options = {"prediction_type": "x0"} | ({"noises": [torch.ones_like(x)] * 2} if sampler is renoise else {})
    grids = [
        [0.9, 0.5, 0.1],
        torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64),
        torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).unsqueeze(1).expand(3, 3),
        [torch.full((3,), v, dtype=torch.float64) for v in (0.9, 0.5, 0.1)],
    ]
    results = [sampler(model, x, grid, process, **options) for grid in grids]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [float, torch.tensor, lambda t: torch.full((8,), t)])
@pytest.mark.parametrize("sampler", [euler, heun, ddim, ddim_invert])
def test_half_precision_is_rounded_once_a_step(sampler, form):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = [form(t) for t in ((0.4, 0.7) if sampler is ddim_invert else (0.7, 0.4))]

    def walk(x):
        # Most of x is taken off again, so that a rounded summand shows. (Heun's second call sees a rounded step.)
        return sampler(lambda x, t: (3 * x.bfloat16()).to(x.dtype), x, grid, FlowProcess(), prediction_type="velocity")

    torch.testing.assert_close(walk(x).float(), walk(x.float()), rtol=1.2 * 2**-8, atol=0)


@pytest.mark.parametrize("sampler", [euler, heun, ddim, renoise])
def test_trajectory_starts_at_the_input_and_ends_at_the_result(sampler):
    process = FlowProcess()
    x, _, _ = start(process, 3)
    torch.manual_seed(0)
    end, path = sampler(
        as_kind(process, "x0"), x, [0.9, 0.5, 0.1], process, prediction_type="x0", return_trajectory=True
    )
    assert path.shape == (3, 3, 2)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], end)


def test_models_get_one_time_per_row_at_their_precision():
    seen = []

    def model(x, t):
        seen.append((t.shape, t.dtype))
        return x

    process = EDMProcess()
    euler(model, torch.randn(4, 2).bfloat16(), process.timesteps(1), process, prediction_type="x0")
    ddim(model, torch.randn(4, 2), VP.timesteps(1), VP)
    assert seen == [((4,), torch.float32), ((4,), torch.int64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sampler", [euler, heun, ddim, renoise])
def test_samples_keep_their_dtype(sampler, dtype):
    process = FlowProcess()
    x = torch.randn(2, 2).to(dtype)
    assert sampler(lambda x, t: x / 2, x, process.timesteps(3), process, prediction_type="x0").dtype == dtype


@pytest.mark.parametrize("sampler", [euler, heun, ddim, renoise])
def test_a_grid_without_a_step_is_refused(sampler):
    with pytest.raises(ValueError, match="at least 2"):
        sampler(lambda x, t: x, torch.zeros(1, 2), [1.0], FlowProcess())


def test_ddim_step_with_eta_has_the_posterior_variance_of_ddpm():
    x_t, x0, noise = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = 500, 499
    bar_t, bar_r = VP.alphas_cumprod[t], VP.alphas_cumprod[r]
    alpha = bar_t / bar_r
    mean = (bar_r.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - bar_r) * x_t) / (1 - bar_t)
    variance = (1 - bar_r) / (1 - bar_t) * (1 - alpha)
    got = ddim_step(x_t, x0, t, r, VP, eta=1.0, noise=noise)
    torch.testing.assert_close(got, mean + variance.sqrt() * noise, rtol=1e-9, atol=1e-9)


def test_ddim_step_takes_an_eps_of_its_own():
    x_t, x0, eps = torch.randn(3, 4, 2).double()
    got = ddim_step(x_t, x0, 500, 250, VP, eps=eps)
    torch.testing.assert_close(got, VP.add_noise(x0, eps, 250))


def test_stochastic_step_without_noise_is_refused():
    with pytest.raises(ValueError, match="needs noise"):
        ddim_step(torch.zeros(1), torch.zeros(1), 5, 4, VP, eta=0.5)


def test_eta_preserves_the_marginal():
    """A Gaussian's stochastic DDIM must keep the variance of x_r, whatever eta (small steps)."""
    n = 40_000
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, dtype=torch.float64, generator=g)
    mean, std = moments(VP, torch.tensor(600))
    noises = [torch.randn(n, 2, dtype=torch.float64, generator=g) for _ in range(50)]
    grid = list(range(600, 349, -5))
    got = ddim(as_kind(VP, "eps"), mean + std * z, grid, VP, eta=1.0, noises=noises)
    mean, std = moments(VP, torch.tensor(350))
    torch.testing.assert_close(got.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(got.std(0), std, rtol=0.02, atol=0)


def test_inversion_then_sampling_returns_the_data():
    x0, _, _ = start(VP, 8)
    model = as_kind(VP, "eps")
    grid = torch.cat([torch.tensor([-1]), torch.arange(0, 1000, 3)])
    noise = ddim_invert(model, x0, grid, VP)
    back = ddim(model, noise, grid.flip(0), VP)
    assert (noise - x0).abs().max() > 0.5
    torch.testing.assert_close(back, x0, rtol=0, atol=0.05)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_average_velocity_lands_exactly_whatever_the_grid(steps):
    process = FlowProcess()
    x, t, end = start(process)

    def average_velocity(x, t, r):
        return (x - exact_map(process, x, t, r)) / (t - r).unsqueeze(-1)

    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * (t - end) + end
    torch.testing.assert_close(flow_map(average_velocity, x, grid), exact_map(process, x, t, end))


def test_flow_map_is_differentiable_through_every_jump():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, 1, dtype=torch.float64)
    flow_map(lambda x, t, r: scale * x, x, [1.0, 0.5, 0.0]).sum().backward()
    assert scale.grad.item() == pytest.approx(2 * (1 - 0.25) * -0.5)


def test_renoise_uses_each_noise_once_and_none_after_the_last_call():
    x, n0, n1 = torch.randn(3, 2, 2, dtype=torch.float64)
    process, grid = FlowProcess(), [0.9, 0.6, 0.3, 0.0]
    got, path = renoise(lambda x, t: x / 2, x, grid, process, noises=[n0, n1], return_trajectory=True)
    first = 0.4 * x / 2 + 0.6 * n0
    second = 0.7 * first / 2 + 0.3 * n1
    torch.testing.assert_close(path, torch.stack([x, first, second, second / 2]))
    assert torch.equal(got, path[-1])


def test_renoise_keeps_sigma_min_out_of_the_noise():
    process, x, noise = EDMProcess(), torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    grid = [80.0, 2.0, 0.002]
    _, path = renoise(lambda x, t: x, x, grid, process, sigma_min=0.002, noises=[noise], return_trajectory=True)
    torch.testing.assert_close(path[1], (4 - 0.002**2) ** 0.5 * noise)


def test_student_input_at_exit_zero_is_the_noise_itself():
    noise = torch.randn(3, 2)
    x_t, t = simulate_student_input(lambda x, t: 1 / 0, noise, [999, 499, -1], 0, VP)
    assert x_t is noise
    assert t.tolist() == [999, 999, 999]


def test_student_input_is_its_own_sample_noised_with_the_outer_noise():
    calls = []

    def student(x, t):
        calls.append((x, t, torch.is_grad_enabled()))
        return x / 3

    noise, begin, between = torch.randn(3, 4, 2, dtype=torch.float64)
    grid = VP.student_times(4)
    x_t, t = simulate_student_input(student, noise, grid, 2, VP, start_noise=begin, noises=[between])
    middle = VP.add_noise(begin / 3, between, 749)
    torch.testing.assert_close(x_t, VP.add_noise(middle / 3, noise, 499))
    assert t.tolist() == [499] * 4
    assert [c[1][0].item() for c in calls] == [999, 749]
    assert [c[2] for c in calls] == [False, False]
    assert torch.equal(calls[0][0], begin)


def test_student_input_has_no_graph():
    scale = torch.ones((), requires_grad=True)
    x_t, _ = simulate_student_input(lambda x, t: x * scale, torch.randn(2, 2), [1.0, 0.5, 0.0], 1, FlowProcess())
    assert not x_t.requires_grad


def test_simulation_draws_its_own_start_at_the_process_scale():
    starts = []

    def student(x, t):
        starts.append(x)
        return x

    simulate_student_input(student, torch.randn(2000, 2), [80.0, 2.5, 0.0], 1, EDMProcess())
    assert starts[0].std().item() == pytest.approx(80, rel=0.1)


@pytest.mark.parametrize("exit_step", [-1, 2, 3])
def test_exits_that_are_no_step_are_refused(exit_step):
    with pytest.raises(ValueError, match="0 to 1"):
        simulate_student_input(lambda x, t: x, torch.zeros(1, 2), [1.0, 0.5, 0.0], exit_step, FlowProcess())


def test_backward_simulation_times():
    grid = torch.linspace(1, 0, 5)
    assert backward_simulation_times(grid, 2).tolist() == [1.0, 0.5, 0.25, 0.0]
    assert backward_simulation_times(grid, 0).tolist() == [1.0, 0.75, 0.0]
    assert backward_simulation_times(grid, 3).tolist() == [1.0, 0.25, 0.0]
    for k in (-1, 4):
        with pytest.raises(ValueError, match="0 to 3"):
            backward_simulation_times(grid, k)


def test_handover_index_takes_the_first_of_equals():
    assert handover_index(torch.tensor([900, 700, 500]), torch.tensor([999, 600, 499]), 1) == 1
