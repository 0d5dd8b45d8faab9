"""Losses of distribution matching: values, gradients, stop-gradients, limit cases."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion.losses import (
    denoising_loss,
    density_ratio,
    dmd_loss,
    edm_loss_weight,
    fdistill_weight,
    gan_discriminator_loss,
    gan_generator_loss,
    gradient_penalty,
    sid_loss,
    update_bin_means,
)

SHAPE = (4, 3, 5, 5)


def triple(dtype=torch.float64, shape=SHAPE):
    g = torch.Generator().manual_seed(0)
    x, teacher, fake = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    return x.requires_grad_(True), teacher.requires_grad_(True), fake.requires_grad_(True)


def field(x, teacher, fake, floor=1e-6):
    distance = (x - teacher).abs().flatten(1).mean(1).clamp(min=floor).reshape(-1, 1, 1, 1)
    return ((fake - teacher) / distance).detach()


# --- dmd_loss


def test_dmd_gradient_is_the_field_over_numel():
    x, teacher, fake = triple()
    loss = dmd_loss(x, teacher, fake)
    loss.backward()
    g = field(x, teacher, fake)
    torch.testing.assert_close(x.grad, g / x.numel(), rtol=1e-14, atol=0)
    torch.testing.assert_close(loss.detach(), g.square().mean() / 2)


def test_dmd_gradient_is_exact_even_where_the_field_is_tiny():
    """x - sg(x - g) in float32 would round a field of 1e-6 beside x = 1 to a few bits."""
    x, teacher, fake = triple(torch.float32)
    with torch.no_grad():
        fake.copy_(teacher + 1e-6 * fake)
    dmd_loss(x, teacher, fake).backward()
    torch.testing.assert_close(x.grad, field(x, teacher, fake) / x.numel(), rtol=1e-6, atol=0)


def test_dmd_has_no_graph_but_through_x():
    x, teacher, fake = triple()
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    dmd_loss(x, teacher, fake, weight=weight).backward()
    assert x.grad is not None
    assert (teacher.grad, fake.grad, weight.grad) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_dmd_is_exactly_zero_where_the_scores_agree(dtype, normalize):
    x, teacher, _ = triple(dtype)
    loss = dmd_loss(x, teacher, teacher.clone(), normalize=normalize)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_dmd_is_finite_where_x_is_the_teachers_prediction():
    x, _, fake = triple()
    loss = dmd_loss(x, x.detach().clone(), fake, floor=1e-6)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(x.grad, (fake - x).detach() / 1e-6 / x.numel())


def test_dmd_floor_is_a_clamp_not_an_offset():
    x, teacher, fake = triple()
    assert dmd_loss(x, teacher, fake, floor=1e-6) == dmd_loss(x, teacher, fake, floor=0.5)


def test_dmd_in_bfloat16_is_computed_in_float32():
    x, teacher, fake = triple(torch.bfloat16)
    loss = dmd_loss(x, teacher, fake)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    expected = dmd_loss(x.float(), teacher.float(), fake.float())
    assert loss.item() == expected.item()
    exact = field(x.float(), teacher.float(), fake.float()) / x.numel()
    assert torch.equal(x.grad, exact.bfloat16())


def test_dmd_field_is_invariant_to_a_joint_scale_and_linear_in_the_score_difference():
    x, teacher, fake = triple()
    whole = dmd_loss(x, teacher, fake)
    torch.testing.assert_close(dmd_loss(x / 2, teacher / 2, fake / 2), whole)
    torch.testing.assert_close(dmd_loss(x, teacher, teacher + 3 * (fake - teacher)), 9 * whole)


def test_dmd_field_sees_a_common_offset_of_the_scores_in_the_normaliser_only():
    x, teacher, fake = triple()
    moved = dmd_loss(x, teacher + 5, fake + 5)
    ratio = (x - teacher).abs().flatten(1).mean(1) / (x - teacher - 5).abs().flatten(1).mean(1)
    (plain,) = torch.autograd.grad(dmd_loss(x, teacher, fake), x)
    (shifted,) = torch.autograd.grad(moved, x)
    torch.testing.assert_close(shifted, plain * ratio.detach().reshape(-1, 1, 1, 1))


def test_dmd_normalises_each_sample_alone():
    x, teacher, fake = triple()
    alone = torch.stack([dmd_loss(x[i : i + 1], teacher[i : i + 1], fake[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(dmd_loss(x, teacher, fake), alone.mean())


def test_dmd_without_normaliser_is_diff_instruct():
    x, teacher, fake = triple()
    dmd_loss(x, teacher, fake, normalize=False).backward()
    diff_instruct = (fake - teacher).detach() / 4
    torch.testing.assert_close(x.grad * math.prod(SHAPE[1:]), diff_instruct)


def test_dmd_weight_scales_the_field_per_sample():
    x, teacher, fake = triple()
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    dmd_loss(x, teacher, fake, weight=weight).backward()
    torch.testing.assert_close(x.grad, field(x, teacher, fake) * weight.reshape(-1, 1, 1, 1) / x.numel())


def test_dmd_mask_averages_over_the_selected_and_normalises_over_all():
    x, teacher, fake = triple()
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.3
    dmd_loss(x, teacher, fake, mask=mask).backward()
    torch.testing.assert_close(x.grad, field(x, teacher, fake) * mask / mask.sum())


@pytest.mark.parametrize("mask", [torch.tensor([True, True, False, True]), torch.ones(4, 1, 1, 1).bool()])
def test_dmd_mask_of_samples_leaves_the_others_as_without_them(mask):
    x, teacher, fake = triple()
    keep = mask.flatten()
    (padded,) = torch.autograd.grad(dmd_loss(x, teacher, fake, mask=mask), x)
    (alone,) = torch.autograd.grad(dmd_loss(x[keep], teacher[keep], fake[keep]), x)
    torch.testing.assert_close(padded, alone)


def test_dmd_empty_mask_is_zero_and_finite():
    x, teacher, fake = triple()
    loss = dmd_loss(x, teacher, fake, mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("loss", [dmd_loss, sid_loss])
def test_shapes_that_would_broadcast_are_refused(loss):
    x, teacher, fake = triple()
    with pytest.raises(ValueError, match=r"fake_x0 \(1, 3, 5, 5\)"):
        loss(x, teacher, fake[:1])


def test_noise_that_would_broadcast_is_refused():
    x, x0, noise = triple()
    with pytest.raises(ValueError, match=r"noise \(1, 3, 5, 5\)"):
        denoising_loss(x, x0, noise[:1], prediction_type="eps")


def test_dmd_compiles_to_one_graph():
    x, teacher, fake = triple()
    mask = torch.tensor([True, False, True, True])
    compiled = torch.compile(dmd_loss, fullgraph=True, backend="eager")
    assert compiled(x, teacher, fake, mask=mask) == dmd_loss(x, teacher, fake, mask=mask)


# --- denoising_loss


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "velocity"])
def test_denoising_loss_is_zero_at_its_target_and_quadratic_around_it(kind):
    x0, noise, error = triple()
    alpha, sigma = torch.tensor([0.9, 0.6, 0.3, 0.1]).double(), torch.tensor([0.1, 0.3, 0.6, 0.9]).double()
    a, s = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    target = {"x0": x0, "eps": noise, "v": a * noise - s * x0, "velocity": noise - x0}[kind].detach()
    options = {"prediction_type": kind, "alpha": alpha, "sigma": sigma}
    assert denoising_loss(target, x0, noise, **options) == 0
    got = denoising_loss(target + error, x0, noise, reduction="none", **options)
    torch.testing.assert_close(got, error.square().flatten(1).mean(1))
    torch.testing.assert_close(denoising_loss(target + error, x0, noise, **options), error.square().mean())


def test_denoising_loss_weights_and_stop_gradients():
    x0, noise, prediction = triple()
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = denoising_loss(prediction, x0, noise, prediction_type="eps", weight=weight)
    loss.backward()
    assert (x0.grad, noise.grad, weight.grad) == (None, None, None)
    expected = 2 * weight.reshape(-1, 1, 1, 1) * (prediction - noise) / prediction.numel()
    torch.testing.assert_close(prediction.grad, expected.detach())


def test_denoising_loss_takes_a_weight_per_frame():
    x0, _, prediction = triple(shape=(2, 3, 4))
    weight = torch.rand(2, 3).double()
    got = denoising_loss(prediction, x0, weight=weight, reduction="none")
    torch.testing.assert_close(got, ((prediction - x0).square() * weight.unsqueeze(-1)).flatten(1).mean(1))


def test_denoising_loss_lifts_half_precision():
    x0, _, prediction = triple(torch.bfloat16)
    assert denoising_loss(prediction, x0).dtype == torch.float32
    assert denoising_loss(prediction, x0) == denoising_loss(prediction.float(), x0.float())
    many = torch.full((1, 4096), 300.0).half()
    assert denoising_loss(many, torch.zeros_like(many)) == 90000, "overflows in float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "eps"}, "needs noise"),
        ({"prediction_type": "v", "noise": torch.zeros(SHAPE)}, "alpha and sigma"),
        ({"prediction_type": "flow"}, "'x0', 'eps', 'v', 'velocity'"),
        ({"reduction": "sum"}, "'mean', 'none'"),
    ],
)
def test_denoising_loss_names_what_is_missing(options, message):
    with pytest.raises(ValueError, match=message):
        denoising_loss(torch.zeros(SHAPE), torch.zeros(SHAPE), **options)


def test_edm_loss_weight():
    sigma = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(edm_loss_weight(sigma), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)


# --- adversarial


@pytest.mark.parametrize(("kind", "value"), [("softplus", math.log(2)), ("hinge", 0.0), ("relativistic", math.log(2))])
def test_generator_loss_at_logit_zero(kind, value):
    zero = torch.zeros(4, 3)
    assert gan_generator_loss(zero, zero, kind=kind).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "value"), [("softplus", 2 * math.log(2)), ("hinge", 2.0), ("relativistic", math.log(2))]
)
def test_discriminator_loss_at_logit_zero(kind, value):
    zero = torch.zeros(4, 3)
    assert gan_discriminator_loss(zero, zero, kind=kind).item() == pytest.approx(value)


@pytest.mark.parametrize("kind", ["softplus", "hinge", "relativistic"])
def test_generator_and_discriminator_pull_apart(kind):
    fake, real = torch.randn(2, 4, 3).double().mul(0.3).requires_grad_(True)
    (up,) = torch.autograd.grad(gan_generator_loss(fake, real, kind=kind), fake)
    down, apart = torch.autograd.grad(gan_discriminator_loss(real, fake, kind=kind), (fake, real))
    assert (up < 0).all(), "the generator raises the logits of generated samples"
    assert (down > 0).all(), "the discriminator lowers them"
    assert (apart < 0).all(), "and raises those of real ones"


def test_hinge_is_flat_beyond_its_margin():
    real, fake = torch.tensor([2.0]).requires_grad_(True), torch.tensor([-2.0]).requires_grad_(True)
    assert gan_discriminator_loss(real, fake, kind="hinge") == 0
    assert gan_generator_loss(fake, kind="hinge") == 2


def test_relativistic_loss_sees_differences_alone_and_gives_real_no_gradient_in_the_generators_turn():
    fake, real = torch.randn(2, 4, 3).double().requires_grad_(True)
    shifted = gan_generator_loss(fake + 7, real + 7, kind="relativistic")
    torch.testing.assert_close(shifted, gan_generator_loss(fake, real, kind="relativistic"))
    assert torch.autograd.grad(shifted, real, allow_unused=True, materialize_grads=True)[0].abs().sum() == 0
    with pytest.raises(ValueError, match="real_logits"):
        gan_generator_loss(fake, kind="relativistic")
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        gan_discriminator_loss(real[:1], fake, kind="relativistic")


def test_adversarial_losses_stay_finite_at_huge_logits():
    huge = torch.tensor([1e4, -1e4])
    for kind in ("softplus", "hinge", "relativistic"):
        assert gan_generator_loss(huge, -huge, kind=kind).isfinite()
        assert gan_discriminator_loss(huge, -huge, kind=kind).isfinite()
    assert gan_generator_loss(torch.tensor([1e4]).half()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["softplus", "hinge", "relativistic"])
def test_adversarial_losses_per_sample(kind):
    fake, real = torch.randn(2, 4, 3)
    for loss in (gan_generator_loss, gan_discriminator_loss):
        rows = loss(real, fake, kind=kind, reduction="none")
        assert rows.shape == (4,)
        torch.testing.assert_close(rows.mean(), loss(real, fake, kind=kind))


def test_discriminator_batches_may_differ_in_size():
    real, fake = torch.zeros(2), torch.zeros(6)
    assert gan_discriminator_loss(real, fake).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("loss", [gan_generator_loss, gan_discriminator_loss])
def test_unknown_kinds_are_refused(loss):
    with pytest.raises(ValueError, match="'softplus', 'hinge', 'relativistic'"):
        loss(torch.zeros(1), torch.zeros(1), kind="wgan")


def test_gradient_penalty_of_a_quadratic_and_its_own_gradient():
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, 3).double().requires_grad_(True)
    logits = scale * x.square().flatten(1).sum(1)
    rows = gradient_penalty(logits, x, reduction="none")
    torch.testing.assert_close(rows, 4 * scale**2 * x.square().flatten(1).sum(1))
    gradient_penalty(logits, x).backward()
    torch.testing.assert_close(scale.grad, (8 * scale * x.square().flatten(1).sum(1)).mean().detach())


def test_gradient_penalty_sums_over_heads():
    x = torch.randn(2, 3).double().requires_grad_(True)
    rows = gradient_penalty(torch.stack([x.sum(1), 2 * x.sum(1)], 1), x, reduction="none")
    torch.testing.assert_close(rows, torch.full((2,), 27.0).double())


def test_gradient_penalty_refuses_inputs_without_gradient():
    with pytest.raises(ValueError, match="require grad"):
        gradient_penalty(torch.zeros(1), torch.zeros(1, 2))


# --- sid_loss, f-distill


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_sid_loss_formula_and_reductions(alpha):
    x, teacher, fake = triple()
    d = teacher - fake
    normaliser = (x - teacher).abs().flatten(1).mean(1)
    expected = (d * ((teacher - x) - alpha * d)).flatten(1).sum(1) / normaliser
    torch.testing.assert_close(sid_loss(x, teacher, fake, alpha=alpha, reduction="none"), expected)
    torch.testing.assert_close(sid_loss(x, teacher, fake, alpha=alpha), expected.mean())


def test_sid_keeps_the_graph_through_both_scores_but_not_through_the_normaliser():
    x, teacher, fake = triple()
    w = (x - teacher).abs().flatten(1).mean(1).detach().reshape(-1, 1, 1, 1)

    def by_hand(x, teacher, fake):
        d = teacher - fake
        return (d * ((teacher - x) - 1.2 * d) / w).flatten(1).sum(1).mean()

    got = torch.autograd.grad(sid_loss(x, teacher, fake), (x, teacher, fake))
    for a, b in zip(got, torch.autograd.grad(by_hand(x, teacher, fake), (x, teacher, fake)), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_sid_is_zero_with_zero_gradient_where_both_scores_are_one():
    x, _, _ = triple()
    score = torch.tanh(x)
    loss = sid_loss(x, score, score)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0


def test_sid_is_finite_at_the_teachers_prediction():
    x, _, fake = triple()
    assert sid_loss(x, x.detach(), fake).isfinite()


RATIO = {
    "rkl": lambda r: 1.0,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
    "hellinger": math.sqrt,
}


@pytest.mark.parametrize("divergence", RATIO)
def test_fdistill_weights_at_ratios_where_h_is_known(divergence):
    ratios = [0.1, 1.0, 20.0]
    h = torch.tensor([RATIO[divergence](r) for r in ratios])
    got = fdistill_weight(torch.tensor(ratios).log(), divergence)
    torch.testing.assert_close(got, h / h.mean())
    assert got.mean().item() == pytest.approx(1.0)


def test_fdistill_weight_has_no_graph_and_rkl_is_dmd():
    logits = torch.randn(5, 3, requires_grad=True)
    assert not fdistill_weight(logits, "js").requires_grad
    assert torch.equal(fdistill_weight(logits, "rkl"), torch.ones(5))
    with pytest.raises(ValueError, match="'rkl', 'kl', 'js'"):
        fdistill_weight(logits, "tv")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fdistill_weight_is_single_precision_whatever_it_is_given(dtype):
    logits, means = torch.tensor([-1.0, 0.5], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    assert fdistill_weight(logits, "kl", bin_mean=means).dtype == torch.float32


def test_density_ratio_averages_heads_before_the_exponential_and_clamps():
    logits = torch.tensor([[1.0, -1.0], [50.0, 50.0], [-50.0, -50.0]])
    torch.testing.assert_close(density_ratio(logits), torch.tensor([1.0, 20.0, 0.1]))
    assert density_ratio(logits.double()).dtype == torch.float32


def test_bin_means_move_only_where_bins_occur():
    old = torch.ones(4)
    new = update_bin_means(old, torch.tensor([0, 0, 2]), torch.tensor([2.0, 4.0, 9.0]), decay=0.75)
    torch.testing.assert_close(new, torch.tensor([1.5, 1.0, 3.0, 1.0]))
    assert torch.equal(old, torch.ones(4)), "pure"
    torch.testing.assert_close(
        fdistill_weight(torch.tensor([2.0, 4.0]).log(), "kl", bin_mean=torch.tensor([2.0, 4.0])), torch.ones(2)
    )
