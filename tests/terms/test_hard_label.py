"""The teacher's decision as a label: what of the teacher counts, and what does not."""

from __future__ import annotations

import pytest
import torch
from distilling import distiller, prepared
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from visiondistill.losses import kd_loss
from visiondistill.terms.hard_label import HardLabel, hard_label_loss

B, K = 5, 4


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(B, K, generator=g, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_equals_its_slow_twin(logits, smoothing: float) -> None:
    rows = []
    for ours, theirs in zip(*logits, strict=True):
        decided = max(range(K), key=lambda k: theirs[k])
        target = [smoothing / K + (1 - smoothing) * (k == decided) for k in range(K)]
        rows.append(-sum(share * (x - ours.exp().sum().log()) for share, x in zip(target, ours, strict=True)))
    torch.testing.assert_close(hard_label_loss(*logits, smoothing, "none"), torch.stack(rows))
    torch.testing.assert_close(hard_label_loss(*logits, smoothing), torch.stack(rows).mean())


def test_only_the_decision_counts_and_the_teacher_learns_nothing(logits) -> None:
    student, teacher = logits
    value = hard_label_loss(student, teacher)
    for same in (0.1 * teacher, teacher - 7.0, one_hot(teacher.argmax(1), K).double()):
        assert torch.equal(hard_label_loss(student, same), value)
    theirs = teacher.clone().requires_grad_()
    (ours, none) = torch.autograd.grad(hard_label_loss(student, theirs), (student, theirs), allow_unused=True)
    assert none is None
    torch.testing.assert_close(ours, (student.softmax(1) - one_hot(teacher.argmax(1), K)) / B)


def test_it_is_the_limit_of_a_confident_teacher(logits) -> None:
    student, teacher = logits
    torch.testing.assert_close(kd_loss(student, 1e6 * teacher, 1.0), hard_label_loss(student, teacher))


def test_gradcheck(logits) -> None:
    assert torch.autograd.gradcheck(lambda s: hard_label_loss(s, logits[1], 0.1), logits[0])


def test_extreme_and_half_precision_logits_are_finite(logits) -> None:
    student, teacher = (1e4 * x.detach().float().sign() for x in logits)
    student.requires_grad_()
    value = hard_label_loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert hard_label_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_the_term_is_its_loss_on_every_image() -> None:
    """Those without a label as well."""
    method = distiller({"hard": HardLabel(0.1)}, labelled=2)
    batch = prepared(method)
    logits = method.players["student"](batch["train"]["image"]).logits
    expected = cross_entropy(logits, batch["teacher"]["logits"].argmax(1), label_smoothing=0.1)
    torch.testing.assert_close(method.student_loss(batch)[0]["hard"], expected)


def test_bad_arguments_are_refused(logits) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        HardLabel(1.5)
    with pytest.raises(ValueError, match="same shape"):
        hard_label_loss(logits[0], logits[1][:1])
