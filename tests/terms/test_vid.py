"""Variational information distillation: the density by hand, the best variance, and the predictors in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import distiller, net, play, prepared, weights
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import adaptive_avg_pool2d

from visiondistill.engine.errors import SettingsError
from visiondistill.losses import hint_loss
from visiondistill.terms import CE
from visiondistill.terms.vid import SMALLEST_VARIANCE, VID, Predictor, vid_loss

B, C = 3, 4


@pytest.fixture(autouse=True)
def same_predictors() -> None:
    torch.manual_seed(0)


@pytest.fixture
def maps() -> tuple[Tensor, Tensor, Tensor]:
    """What is predicted, variances, the teacher's."""
    g = torch.Generator().manual_seed(6)
    predicted, teacher = (torch.randn(B, C, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    variance = torch.rand(C, generator=g, dtype=torch.float64) + 0.1
    return predicted.requires_grad_(), variance.requires_grad_(), teacher


def test_is_a_log_density_without_its_constant(maps) -> None:
    predicted, variance, teacher = maps
    density = Normal(predicted, variance[:, None, None].sqrt().expand_as(predicted)).log_prob(teacher)
    constant = 0.5 * torch.tensor(2 * torch.pi).double().log()
    expected = -(density + constant).flatten(1).mean(1)
    torch.testing.assert_close(vid_loss(*maps, "none"), expected)
    torch.testing.assert_close(vid_loss(*maps), expected.mean())


def test_with_unit_variance_it_is_half_of_a_hint(maps) -> None:
    predicted, _, teacher = maps
    torch.testing.assert_close(vid_loss(predicted, torch.ones(C).double(), teacher), hint_loss(predicted, teacher) / 2)


def test_the_best_variance_is_the_squared_error_of_the_channel(maps) -> None:
    predicted, _, teacher = maps
    best = (teacher - predicted.detach()).square().mean((0, 2, 3)).requires_grad_()
    value = vid_loss(predicted, best, teacher)
    (gradient,) = torch.autograd.grad(value, best)
    assert gradient.abs().max() < 1e-15
    torch.testing.assert_close(value, 0.5 * (1 + best.log()).mean())
    assert all(vid_loss(predicted, factor * best, teacher) > value for factor in (0.5, 0.99, 1.01, 2.0))


def test_a_channel_that_cannot_be_predicted_teaches_less(maps) -> None:
    predicted, _, teacher = maps
    variance = torch.tensor([1.0, 1.0, 1e6, 4.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(vid_loss(predicted, variance, teacher), predicted)
    expected = (predicted - teacher) / variance[:, None, None] / predicted.numel()
    torch.testing.assert_close(gradient, expected)


def test_gradcheck(maps) -> None:
    predicted, variance, teacher = maps
    assert torch.autograd.gradcheck(vid_loss, (predicted, variance, teacher.clone().requires_grad_()))


@pytest.mark.parametrize("factor", [0.0, 1e4, 1e12])
def test_features_of_any_size_and_half_precision_are_finite(maps, factor: float) -> None:
    predicted = (factor * maps[0].detach()).bfloat16().requires_grad_()
    variance = torch.full((C,), SMALLEST_VARIANCE).requires_grad_()
    value = vid_loss(predicted, variance, -factor * maps[2].bfloat16())
    assert value.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (predicted, variance)))


@pytest.mark.parametrize("variance", [1e-4, 0.3, 5.0, 1e3])
def test_a_predictor_begins_with_the_variance_asked_for(variance: float) -> None:
    mean, found = Predictor(3, C, variance)(torch.randn(2, 3, 4, 4))
    assert mean.shape == (2, C, 4, 4)
    torch.testing.assert_close(found, torch.full((C,), variance), rtol=1e-3, atol=0)
    extreme = Predictor(3, C, 1.0)
    torch.nn.init.constant_(extreme.scale, -1e4)
    assert extreme(torch.zeros(1, 3, 1, 1))[1].min() == torch.tensor(SMALLEST_VARIANCE)


def test_the_term_is_the_sum_over_its_stages_at_the_lower_resolution() -> None:
    method = distiller({"vid": VID((0, 1), (1, 0), initial_variance=2.0)})
    batch = prepared(method)
    ours, theirs = (
        network(batch["train"]["image"], (0, 1)).features
        for network in (method.players["student"], method.frozen["teacher"])
    )
    expected = 0.0
    for predictor, own, other in zip(method.players["vid_predictors"], (0, 1), (1, 0), strict=True):
        student, teacher = (adaptive_avg_pool2d(side, 4) for side in (ours[own], theirs[other]))
        assert {ours[own].shape[-1], theirs[other].shape[-1]} == {8, 4}
        expected = expected + vid_loss(*predictor(student), teacher)
    torch.testing.assert_close(method.student_loss(batch)[0]["vid"], expected)


def test_its_gradient_reaches_student_and_predictors_and_no_teacher() -> None:
    method = distiller({"vid": VID((0, 1), (0, 1))})
    method.student_loss(prepared(method))[0]["vid"].backward()
    assert all(p.grad.any() for p in method.players["vid_predictors"].parameters())
    assert all(p.grad.any() for p in method.players["student"].model.stages.parameters())
    assert all(p.grad is None for p in method.frozen["teacher"].parameters())


def test_micro_batches_make_the_same_step(tmp_path: Path) -> None:
    whole, split = (distiller({"vid": VID((1,), (1,))}) for _ in range(2))
    split.players.load_state_dict(whole.players.state_dict())
    play(whole, tmp_path / "whole")
    play(split, tmp_path / "split", grad_accum_steps=2)
    torch.testing.assert_close(weights(split.players), weights(whole.players))


def test_a_compiled_run_resumes_to_the_bit_and_leaves_the_plain_student(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 3, "keep": 9, "compile": True, "compile_backend": "eager"}
    terms = {"ce": CE(), "vid": VID((0, 1), (0, 1))}
    whole = play(distiller(terms), tmp_path / "whole", **settings)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    other = distiller({"ce": CE(), "vid": VID((0, 1), (0, 1))}, student=net(4, 5, seed=1))
    again = play(other, tmp_path / "again", resume=middle, **settings)
    assert all(torch.equal(again.method.state_dict()[name], value) for name, value in whole.method.state_dict().items())
    assert whole.history[-1]["student/vid"] < whole.history[0]["student/vid"]
    assert whole.product.state_dict().keys() == net(4, 5).state_dict().keys()


def test_bad_arguments_are_refused(maps) -> None:
    with pytest.raises(SettingsError, match="in pairs"):
        VID((0,), (0, 1))
    with pytest.raises(ValueError, match="initial_variance"):
        VID(initial_variance=0.0)
    with pytest.raises(ValueError, match="same shape"):
        vid_loss(maps[0], maps[1], maps[2][:, :2])
    with pytest.raises(ValueError, match="variance must be"):
        vid_loss(maps[0], maps[1][:2], maps[2])
