"""Normalised distillation: the loss by hand, its gradient in closed form, and its parts in those of a divergence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distilling import distiller, net, play, prepared
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from visiondistill.augmentors import Mix
from visiondistill.engine.errors import SettingsError
from visiondistill.losses import kd_loss
from visiondistill.terms.nkd import NKD, nkd_loss

B, K = 5, 4


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    student, teacher = (2 * torch.randn(B, K, generator=g, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.tensor([0, 1, 2, 3, 1])


def others(logits: Tensor, target: Tensor) -> Tensor:
    """Logits of the other classes, `[B, K - 1]`, by a loop."""
    rows = zip(logits, target.tolist(), strict=True)
    return torch.stack([torch.cat([row[:label], row[label + 1 :]]) for row, label in rows])


def test_equals_its_slow_twin(given) -> None:
    rows = []
    for student, teacher, label in zip(*given, strict=True):
        p, q = (x.exp() / x.exp().sum() for x in (student, teacher))
        value = -q[label] * p[label].log()
        rest = [k for k in range(K) if k != label]
        sums = [sum(math.exp(x[k] / 3.0) for k in rest) for x in (student.detach(), teacher)]
        for k in rest:
            shares = [(x[k] / 3.0).exp() / total for x, total in zip((student, teacher), sums, strict=True)]
            value = value - 0.7 * 9.0 * shares[1] * shares[0].log()
        rows.append(value)
    torch.testing.assert_close(nkd_loss(*given, 0.7, 3.0, "none"), torch.stack(rows))
    torch.testing.assert_close(nkd_loss(*given, 0.7, 3.0), torch.stack(rows).mean())


def test_its_gradient_in_closed_form(given) -> None:
    """On the target class the teacher's probability scales a label's gradient; on the others `gamma T (p' - q')`."""
    student, teacher, target = given
    (gradient,) = torch.autograd.grad(nkd_loss(student, teacher, target, 0.7, 3.0, "none").sum(), student)
    sure = teacher.softmax(1).gather(1, target[:, None])
    expected = sure * (student.softmax(1) - one_hot(target, K))
    difference = (others(student, target) / 3.0).softmax(1) - (others(teacher, target) / 3.0).softmax(1)
    expected[~one_hot(target, K).bool()] += 0.7 * 3.0 * difference.flatten()
    torch.testing.assert_close(gradient, expected)


def test_its_parts_are_those_of_a_divergence(given) -> None:
    """KD's cross-entropy damps the others' part by `1 - q_y`, and has a third one, which normalising leaves out."""
    student, teacher, target = given
    p, q = (x.softmax(1).gather(1, target[:, None])[:, 0] for x in (student, teacher))
    first = nkd_loss(student, teacher, target, 0.0, reduction="none")
    rest = nkd_loss(student, teacher, target, 1.0, reduction="none") - first
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1)
    expected = kd_loss(student, teacher, 1.0, "none") + entropy
    torch.testing.assert_close(first + (1 - q) * rest - (1 - q) * (1 - p).log(), expected)


def test_of_a_sure_teacher_the_first_part_is_the_label(given) -> None:
    student, _, target = given
    sure = 100 * one_hot(target, K).double()
    torch.testing.assert_close(nkd_loss(student, sure, target, 0.0), cross_entropy(student, target))
    # The others are equally likely to it.
    even = -others(student, target).log_softmax(1).mean()
    torch.testing.assert_close(nkd_loss(student, sure, target, 1.5), cross_entropy(student, target) + 1.5 * even)


def test_shifts_of_either_side_change_nothing(given) -> None:
    student, teacher, target = given
    shift = torch.randn(B, 1, dtype=torch.float64)
    torch.testing.assert_close(nkd_loss(student + shift, teacher - 9 * shift, target), nkd_loss(*given))


def test_two_classes_leave_the_first_part_alone(given) -> None:
    student, teacher, target = given[0][:, :2], given[1][:, :2], given[2] % 2
    torch.testing.assert_close(nkd_loss(student, teacher, target, 5.0), nkd_loss(student, teacher, target, 0.0))


def test_gradcheck_once_and_twice(given) -> None:
    student, teacher, target = given

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        return nkd_loss(ours, theirs, target, 0.7, 3.0)

    inputs = (student, teacher.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_extreme_and_half_precision_logits_are_finite(given) -> None:
    student, teacher = (1e4 * x.detach().float().sign() for x in given[:2])
    student.requires_grad_()
    value = nkd_loss(student, teacher, given[2])
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()
    half = nkd_loss(given[0].bfloat16(), given[1].bfloat16(), given[2])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, nkd_loss(*given).float(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("labelled", [12, 6])
def test_the_term_is_its_loss_over_labelled_images(labelled: int) -> None:
    method = distiller({"nkd": NKD(0.7, 3.0)}, labelled=labelled)
    batch = prepared(method)
    logits, label = method.players["student"](batch["train"]["image"]).logits, batch["train"]["label"]
    rows = nkd_loss(logits, batch["teacher"]["logits"], label.clamp(min=0), 0.7, 3.0, "none")
    expected = (rows * (label >= 0)).mean() / (labelled / 12)
    torch.testing.assert_close(method.student_loss(batch)[0]["nkd"], expected)


def test_a_compiled_run_resumes_to_the_bit_and_leaves_the_plain_student(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 3, "keep": 9, "compile": True, "compile_backend": "eager"}
    whole = play(distiller({"nkd": NKD()}), tmp_path / "whole", **settings)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    other = distiller({"nkd": NKD()}, student=net(4, 5, seed=1))
    again = play(other, tmp_path / "again", resume=middle, **settings)
    assert all(torch.equal(again.method.state_dict()[name], value) for name, value in whole.method.state_dict().items())
    assert whole.history[-1]["student/nkd"] < whole.history[0]["student/nkd"]
    assert whole.product.state_dict().keys() == net(4, 5).state_dict().keys()


def test_bad_arguments_are_refused(given) -> None:
    student, teacher, target = given
    with pytest.raises(ValueError, match="temperature"):
        NKD(temperature=0.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        nkd_loss(student[:, :1], teacher[:, :1], target * 0)
    with pytest.raises(ValueError, match="same shape"):
        nkd_loss(student, teacher[:2], target)
    with pytest.raises(SettingsError, match="one label per image"):
        distiller({"nkd": NKD()}, augmentor=Mix(3))
