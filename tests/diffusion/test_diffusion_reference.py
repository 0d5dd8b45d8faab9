"""Values and gradients that official code gave on fixed inputs (`reference_values/`)."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion.denoiser import EDMPreconditioner, edm_scalings
from diffusion.losses import (
    denoising_loss,
    dmd_loss,
    edm_loss_weight,
    fdistill_weight,
    gan_discriminator_loss,
    gan_generator_loss,
    sid_loss,
    update_bin_means,
)
from diffusion.losses.divergence import density_ratio
from diffusion.process import (
    ContinuousVPProcess,
    EDMProcess,
    FlowProcess,
    TrigProcess,
    VPProcess,
    karras_sigmas,
    shift_time,
    time_quantile,
)
from diffusion.samplers import ddim, ddim_invert, euler, flow_map, handover_index

close = torch.testing.assert_close


@pytest.fixture
def load(shared_dir):
    def read(name):
        return torch.load(shared_dir / "reference_values" / f"{name}.pt", weights_only=True)

    return read


def tiny_edm(net):
    """The stand-in network of the reference values."""

    def raw(x, c_noise, labels):
        h = torch.einsum("oi,bihw->bohw", net["W"], x)
        bias = net["b"] + labels @ net["E"]
        return h + (bias + c_noise.reshape(-1, 1) * net["k"])[:, :, None, None]

    return EDMPreconditioner(raw, sigma_data=0.5)


# --- DMD2, FastGen, SiD losses


def test_dmd2_generator_loss(load):
    case = load("dmd/dmd2_edm_dm_loss")
    given, out = case["inputs"], case["outputs"]
    process, sigma = EDMProcess(), given["sigma"].flatten()
    close(karras_sigmas(1000)[given["timesteps"].flatten()].float(), sigma, rtol=1e-5, atol=1e-6)
    x = given["latents"].clone().requires_grad_(True)
    x_t = process.add_noise(x, given["noise"], sigma)
    close(x_t.detach(), out["noisy_latents"], rtol=1e-5, atol=1e-6)
    real = tiny_edm(given["real_net"])(x_t, sigma, given["labels"])
    fake = tiny_edm(given["fake_net"])(x_t, sigma, given["labels"])
    close(real.detach(), out["pred_real"], rtol=1e-5, atol=2e-6)
    close(fake.detach(), out["pred_fake"], rtol=1e-5, atol=2e-6)
    loss = dmd_loss(x, real, fake)
    loss.backward()
    close(loss.detach(), out["loss"], rtol=1e-5, atol=1e-6)
    close(x.grad, out["dloss_dlatents"], rtol=1e-4, atol=1e-6)
    close(x.grad * x.numel(), out["grad"], rtol=1e-4, atol=1e-4)


def test_dmd2_critic_loss(load):
    case = load("dmd/dmd2_edm_fake_loss")
    given, out = case["inputs"], case["outputs"]
    sigma = given["sigma"].flatten()
    net = {k: v.clone().requires_grad_(True) for k, v in given["fake_net"].items()}
    x_t = EDMProcess().add_noise(given["latents"], given["noise"], sigma)
    prediction = tiny_edm(net)(x_t, sigma, given["labels"])
    close(prediction.detach(), out["x0_pred"], rtol=1e-5, atol=2e-6)
    weight = edm_loss_weight(sigma)
    close(weight, out["weights"].flatten(), rtol=1e-5, atol=1e-6)
    loss = denoising_loss(prediction, given["latents"], weight=weight)
    loss.backward()
    close(loss.detach(), out["loss"], rtol=1e-5, atol=1e-6)
    for name, gradient in case["grads"]["fake_net"].items():
        close(net[name].grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "scaled", "bf16", "gen_equals_teacher"])
def test_fastgen_vsd_loss(load, name):
    case = load("dmd/fastgen_vsd_loss")
    expected = case["cases"][name]
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    x, teacher, fake = (case[k].to(dtype) for k in ("gen_data", "teacher_x0", "fake_score_x0"))
    if name == "gen_equals_teacher":
        x = teacher.clone()
    x.requires_grad_(True)
    loss = dmd_loss(x, teacher, fake, weight=case["additional_scale"] if name == "scaled" else None)
    loss.backward()
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if name == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    close(loss.detach(), expected["loss"].float(), **tolerance)
    close(x.grad, expected["dgen"], **tolerance)


@pytest.mark.parametrize(("name", "kind"), [("x0", "x0"), ("eps", "eps"), ("v", "v"), ("flow", "velocity")])
def test_fastgen_denoising_loss(load, name, kind):
    case = load("dmd/fastgen_dsm_loss")
    process = VPProcess(case["alphas_cumprod"])
    index = (case["t"] * 1000).floor()
    prediction = case["net_pred"].clone().requires_grad_(True)
    loss = denoising_loss(
        prediction,
        case["x0"],
        case["eps"],
        prediction_type=kind,
        alpha=process.alpha(index),
        sigma=process.sigma(index),
    )
    loss.backward()
    close(loss.detach(), case["losses"][name]["loss"], rtol=1e-5, atol=1e-6)
    close(prediction.grad, case["losses"][name]["dpred"], rtol=1e-5, atol=1e-6)


def test_fastgen_gan_losses(load):
    case = load("dmd/fastgen_gan_losses")
    fake, real = (case[k].clone().requires_grad_(True) for k in ("fake_logits", "real_logits"))
    loss = gan_generator_loss(fake)
    close(loss.detach(), case["generator"]["loss"])
    close(torch.autograd.grad(loss, fake)[0], case["generator"]["dfake"])
    loss = gan_discriminator_loss(real, fake)
    close(loss.detach(), case["discriminator"]["loss"])
    gradients = torch.autograd.grad(loss, (fake, real))
    close(gradients[0], case["discriminator"]["dfake"])
    close(gradients[1], case["discriminator"]["dreal"])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_sid_generator_loss(load, alpha):
    case = load("dmd/sid_generator_loss")
    given, expected = case["inputs"], case["alphas"][str(alpha)]
    sigma = time_quantile(given["u"].flatten() * 0.8, "karras", low=0.002, high=80.0).float()
    close(sigma, given["sigma"].flatten(), rtol=1e-5, atol=1e-6)
    x = given["images"].clone().requires_grad_(True)
    x_t = EDMProcess().add_noise(x, given["noise_unit"], sigma)
    real = tiny_edm(given["real_net"])(x_t, sigma, given["labels"])
    fake = tiny_edm(given["fake_net"])(x_t, sigma, given["labels"])
    loss = 100 * sid_loss(x, real, fake, alpha=alpha)
    loss.backward()
    close(loss.detach(), expected["loss_scaled_sum"], rtol=1e-4, atol=1e-2)
    close(x.grad, expected["dimages"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("kl", "kl"),
        ("js", "js"),
        ("sf", "softened_rkl"),
        ("neyman", "neyman"),
        ("sh", "hellinger"),
        ("jf", "jeffreys"),
    ],
)
def test_fastgen_fdistill_weights(load, name, divergence):
    case = load("dmd/fastgen_fdistill_weights")
    logits, given = case["fake_logits"], case["hparams"]
    close(fdistill_weight(logits, divergence), case["h"][f"{name}_norm0"]["h"], rtol=1e-5, atol=1e-6)
    bins, process = given["bin_num"], EDMProcess()
    index = ((case["t"] - process.min_t) / (process.max_t - process.min_t) * bins).long().clamp(0, bins - 1)
    means = update_bin_means(torch.ones(bins), index, density_ratio(logits), given["ratio_ema_rate"])
    expected = case["h"][f"{name}_norm1"]
    close(means, expected["bins"], rtol=1e-5, atol=1e-6)
    close(fdistill_weight(logits, divergence, bin_mean=means[index]), expected["h"], rtol=1e-5, atol=1e-6)


def test_fastgen_edm_preconditioning(load):
    case = load("dmd/fastgen_edm_precond")
    c_skip, c_out, c_in, c_noise = edm_scalings(case["t"])
    x = case["x_t"]
    close((c_in.reshape(-1, 1, 1, 1) * x).float(), case["x_in"], rtol=1e-5, atol=1e-6)
    close(c_noise, case["c_noise"], rtol=1e-10, atol=0)
    out = c_skip.reshape(-1, 1, 1, 1) * x + c_out.reshape(-1, 1, 1, 1) * case["F"]
    close(out.float(), case["out"], rtol=1e-5, atol=1e-6)
    close(edm_scalings(case["r"])[3], case["c_noise_r"], rtol=1e-10, atol=0)


# --- paths


def fastgen_process(name, case):
    """Process, and the map from FastGen's time to ours."""
    if name == "alphas_sd":
        return VPProcess(case["alphas_cumprod_sd"]), lambda t: (t * 1000).floor()
    return {"edm": EDMProcess(), "rf": FlowProcess(max_t=0.999), "trig": TrigProcess()}[name], lambda t: t


@pytest.mark.parametrize("name", ["edm", "alphas_sd", "rf", "trig"])
def test_fastgen_noise_schedules(load, name):
    case = load("dmd/fastgen_noise_schedules")
    expected = case["schedules"][name]
    process, time = fastgen_process(name, case)
    t = time(expected["t"])
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if name == "alphas_sd" else {"rtol": 1e-10, "atol": 1e-12}
    close(process.alpha(t), expected["alpha"], **tolerance)
    close(process.sigma(t), expected["sigma"], **tolerance)
    close(process.add_noise(case["x0"], case["eps"], t), expected["forward"], rtol=1e-5, atol=1e-5)
    if "alpha_prime" in expected:
        close(process.alpha_prime(t), expected["alpha_prime"], rtol=1e-10, atol=1e-12)
        close(process.sigma_prime(t), expected["sigma_prime"], rtol=1e-10, atol=1e-12)
        close(process.velocity(case["x0"], case["eps"], t), expected["cond_velocity"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["edm", "alphas_sd", "rf", "trig"])
def test_fastgen_conversions(load, name):
    """One stored network output, read as every kind at every stored time; the stored x0 stands in for x_t."""
    case = load("dmd/fastgen_noise_schedules")
    expected = case["schedules"][name]
    process, time = fastgen_process(name, case)
    t, kinds = time(expected["t"]), {"x0": "x0", "eps": "eps", "flow": "velocity", "v": "v"}
    for conversion, value in expected["convert"].items():
        source, target = conversion.split("_to_")
        got = process.convert(case["model_output"], case["x0"], t, kinds[source], kinds[target])
        # At the flow's t = 0 FastGen goes from eps through x0 and loses it; we keep it.
        rows = process.sigma(t) > 0 if "eps" in conversion and "flow" in conversion else slice(None)
        close(got[rows], value[rows], rtol=1e-4, atol=1e-5, msg=f"{name} {conversion}")


def test_fastgen_student_lists_of_flow_and_trig(load):
    schedules = load("dmd/fastgen_noise_schedules")["schedules"]
    for n in (1, 2, 4):
        close(FlowProcess(max_t=0.999).student_times(n), schedules["rf"]["t_lists"][str(n)], rtol=1e-10, atol=0)
        close(TrigProcess().student_times(n), schedules["trig"]["t_lists"][str(n)], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("edm_lognormal", {"law": "lognormal", "low": 0.002, "high": 80.0, "mean": -1.1, "std": 2.0}),
        ("edm_uniform", {"law": "uniform", "low": 0.002, "high": 80.0}),
        ("rf_uniform", {"law": "uniform", "low": 0.001, "high": 0.999}),
        ("rf_shifted5", {"law": "shifted", "low": 0.001, "high": 0.999, "shift": 5.0}),
        ("rf_logitnormal", {"law": "logit_normal", "low": 0.001, "high": 0.999}),
        ("sd_uniform", {"law": "uniform", "low": 0.001, "high": 0.999}),
        ("sd_logitnormal", {"law": "logit_normal", "low": 0.001, "high": 0.999}),
        ("trig_uniform", {"law": "uniform", "low": 0.0, "high": math.pi / 2}),
    ],
)
def test_fastgen_time_laws(load, name, law):
    case = load("dmd/fastgen_timestep_samplers")["samplers"][name]
    draw = case["draws"][0]
    u = torch.special.ndtr(draw["value"]) if draw["fn"] == "randn" else draw["value"]
    close(time_quantile(u, **law), case["t"], rtol=1e-9, atol=1e-12)


def test_fastgen_polynomial_law(load):
    case = load("dmd/fastgen_timestep_samplers")["samplers"]["edm_polynomial"]
    drawn = case["draws"][0]["value"]
    close(karras_sigmas(1000)[drawn], case["t"], rtol=1e-9, atol=0)


def test_self_forcing_flow_table(load):
    case = load("dmd/selfforcing_flow_scheduler")
    for shift, table in case["tables"].items():
        steps = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
        close(shift_time(steps, float(shift)).float(), table["sigmas"], rtol=1e-5, atol=1e-6)
        warped = table["warped"]["[1000, 750, 500, 250]"]
        close(FlowProcess(float(shift)).student_times(4)[:-1].float() * 1000, warped, rtol=1e-5, atol=1e-3)
    process, given = FlowProcess(shift=5.0, num_steps=1000), case["add_noise"]
    close(process.add_noise(given["x0"], given["noise"], given["timestep"] / 1000), given["xt"], rtol=1e-5, atol=1e-5)
    for conversion, source, target in (("flow_to_x0", "velocity", "x0"), ("x0_to_flow", "x0", "velocity")):
        given = case[conversion]
        prediction, expected = (given["flow"], given["x0"]) if source == "velocity" else (given["x0"], given["flow"])
        got = process.convert(prediction, given["xt"], given["timestep"] / 1000, source, target)
        close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "process"),
    [("cond_ot", FlowProcess()), ("vp", ContinuousVPProcess("linear")), ("cosine", ContinuousVPProcess("cosine"))],
)
def test_flow_matching_paths(load, name, process):
    """The library's time runs from noise to data: ours is 1 - t and derivatives change sign."""
    case = load("flow/flow_matching_paths")
    expected, t = case[name], 1 - case["t"]
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    close(process.alpha(t), expected["alpha"], **tolerance)
    close(process.sigma(t), expected["sigma"], **tolerance)
    close(process.alpha_prime(t), -expected["d_alpha"], **tolerance)
    close(process.sigma_prime(t), -expected["d_sigma"], **tolerance)
    close(process.add_noise(case["x1_data"], case["x0_noise"], t), expected["x_t"], **tolerance)
    close(process.velocity(case["x1_data"], case["x0_noise"], t), -expected["dx_t"], **tolerance)
    close(process.time_at(expected["snr_inverse_of"].log()), 1 - expected["snr_inverse"], **tolerance)


# --- samplers


def gaussian_x0(case, process):
    mean = torch.tensor(case["hyper"]["mean"], dtype=torch.float64)
    cov = torch.tensor(case["hyper"]["cov"], dtype=torch.float64)

    def model(x, t):
        alpha, sigma = process.alpha(t[0]), process.sigma(t[0])
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2, dtype=torch.float64))
        return mean + (x - alpha * mean) @ gain.T

    return model


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("name", "kind"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_ddim_of_diffusers(load, spacing, name, kind):
    case = load("flow/sched_ddim")
    expected, table = case[f"{spacing}_{name}"], case["alphas_cumprod"]
    process = VPProcess(table, final_alpha_cumprod=float(table[0]) if spacing == "leading" else 1.0)
    grid = process.timesteps(10, spacing, steps_offset=1 if spacing == "leading" else 0)
    assert torch.equal(grid[:-1], expected["timesteps"])
    x0 = gaussian_x0(case, process)

    def model(x, t):
        return process.convert(x0(x, t), x, t, "x0", kind)

    _, states = ddim(model, case["z"], grid, process, prediction_type=kind, return_trajectory=True)
    close(states, expected["states"], rtol=1e-9, atol=1e-9)


def test_stochastic_ddim_of_diffusers(load):
    case = load("flow/sched_ddim")
    expected, process = case["trailing_epsilon_eta0.5"], VPProcess(case["alphas_cumprod"])
    x0 = gaussian_x0(case, process)
    _, states = ddim(
        x0,
        case["z"],
        process.timesteps(10, "trailing"),
        process,
        prediction_type="x0",
        eta=0.5,
        noises=list(expected["noises"]),
        return_trajectory=True,
    )
    close(states, expected["states"], rtol=1e-9, atol=1e-9)


def test_ddim_inversion_of_diffusers(load):
    case = load("flow/sched_ddim_inverse")
    table = VPProcess.from_betas().alphas_cumprod
    process = VPProcess(table, final_alpha_cumprod=float(table[0]))
    x0 = gaussian_x0(case, process)

    def eps(x, t):
        return process.convert(x0(x, t), x, t, "x0", "eps")

    grid = torch.cat([torch.tensor([-1]), case["timesteps"]])
    _, states = ddim_invert(eps, case["x0"], grid, process, return_trajectory=True)
    close(states, case["states"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", ["1.0", "3.0", "5.0"])
def test_flow_euler_of_diffusers_and_exact_flow_maps(load, shift):
    case = load("flow/sched_flow")
    process = FlowProcess()
    x0 = gaussian_x0(case, process)
    expected = case[f"flow_euler_shift{shift}"]
    _, states = euler(x0, case["z"], expected["sigmas"].double(), process, prediction_type="x0", return_trajectory=True)
    close(states, expected["states"], rtol=1e-5, atol=1e-5)
    expected = case[f"flow_map_shift{shift}"]
    close(FlowProcess(float(shift)).timesteps(4), expected["sigmas"], rtol=1e-12, atol=0)
    jumps = iter(expected["states"].diff(dim=0))

    def average_velocity(x, t, r):
        return -next(jumps) / (t - r).unsqueeze(-1)

    close(flow_map(average_velocity, case["z"], expected["sigmas"]), case["exact"], rtol=1e-9, atol=1e-9)


def test_handover_index(load):
    for row in load("dmd/diversity_distillation_switch")["rows"]:
        got = handover_index(row["base_timesteps"], row["distilled_timesteps"], row["run_distilled_from"])
        assert got == row["run_base_till"]
