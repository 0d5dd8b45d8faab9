"""Neuron selectivity transfer: the discrepancy by its kernel, what it ignores, and the term."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import distiller, net, play, prepared
from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.terms.selectivity import NeuronSelectivity, selectivity_loss

B = 3


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    student = torch.randn(B, 3, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(B, 5, 2, 2, generator=g, dtype=torch.float64)


def test_equals_the_discrepancy_by_its_kernel(features) -> None:
    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a.flatten() / a.norm()) @ (b.flatten() / b.norm())) ** 2

    def mean(xs: Tensor, ys: Tensor) -> float:
        return sum(kernel(x, y) for x in xs for y in ys) / (len(xs) * len(ys))

    pairs = list(zip(*(feature.detach() for feature in features), strict=True))
    expected = [mean(s, s) + mean(t, t) - 2 * mean(s, t) for s, t in pairs]
    value = selectivity_loss(*features, reduction="none")
    assert value.tolist() == pytest.approx(expected, rel=1e-9)
    assert selectivity_loss(*features).item() == pytest.approx(sum(expected) / B, rel=1e-9)


def test_order_sign_size_and_copies_of_neurons_change_nothing(features) -> None:
    student, teacher = features
    value = selectivity_loss(student, teacher)
    assert value > 1e-3
    same = teacher[:, [3, 1, 4, 0, 2]] * torch.tensor([1e-3, -1, 2, -5, 1e3], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(selectivity_loss(student, same), value)
    assert selectivity_loss(torch.cat([same, teacher], 1), teacher) < 1e-28


def test_neurons_of_two_places_are_as_far_apart_as_can_be() -> None:
    here, there = torch.zeros(2, 1, 4, 2, 2, dtype=torch.float64)
    here[..., 0, 0] = there[..., 1, 1] = 1
    assert selectivity_loss(here, there).item() == pytest.approx(2)


def test_the_larger_map_is_averaged_down(features) -> None:
    student, teacher = features
    large = teacher.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(selectivity_loss(student, large), selectivity_loss(student, teacher))


def test_gradcheck(features) -> None:
    student, teacher = features
    assert torch.autograd.gradcheck(selectivity_loss, (student, teacher.clone().requires_grad_()))


@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_features_of_any_size_are_finite(features, factor: float) -> None:
    student = (factor * features[0].detach()).float().requires_grad_()
    value = selectivity_loss(student, factor * features[1].float())
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_half_precision_and_autocast_change_no_digit(features) -> None:
    student, teacher = features[0].detach().bfloat16(), features[1].bfloat16()
    value = selectivity_loss(student.float(), teacher.float())
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selectivity_loss(student, teacher), value)


def test_two_batches_are_refused(features) -> None:
    with pytest.raises(ValueError, match="same batch size"):
        selectivity_loss(features[0][:2], features[1])


def test_the_term_is_the_sum_over_its_stages() -> None:
    method = distiller({"nst": NeuronSelectivity((0, -1), (-1, 0))})
    batch = prepared(method)
    ours, theirs = (
        network(batch["train"]["image"], (0, 1)).features
        for network in (method.players["student"], method.frozen["teacher"])
    )
    terms, _ = method.student_loss(batch)
    torch.testing.assert_close(
        terms["nst"], selectivity_loss(ours[0], theirs[1]) + selectivity_loss(ours[1], theirs[0])
    )
    with pytest.raises(SettingsError, match="in pairs"):
        NeuronSelectivity((0,), (0, 1))


def test_a_compiled_run_resumes_to_the_bit_and_leaves_the_plain_student(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 3, "keep": 9, "compile": True, "compile_backend": "eager"}
    whole = play(distiller({"nst": NeuronSelectivity()}), tmp_path / "whole", **settings)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    other = distiller({"nst": NeuronSelectivity()}, student=net(4, 5, seed=1))
    again = play(other, tmp_path / "again", resume=middle, **settings)
    assert all(torch.equal(again.method.state_dict()[name], value) for name, value in whole.method.state_dict().items())
    assert whole.product.state_dict().keys() == net(4, 5).state_dict().keys()
