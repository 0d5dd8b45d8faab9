"""Losses that put the label before the teacher's other classes: OFA, Plackett-Luce, balanced divergences, TAID."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot, softmax

from visiondistill.losses import (
    balanced_divergence_loss,
    kd_loss,
    ofa_loss,
    pld_loss,
    reverse_kd_loss,
    taid_loss,
)

B, K = 6, 5


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    student = 2 * torch.randn(B, K, generator=g, dtype=torch.float64)
    teacher = 3 * torch.randn(B, K, generator=g, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(K, (B,), generator=g)


def gradient(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at)[0]


# --- OFA


def test_ofa_equals_its_slow_twin(logits):
    student, teacher, y = logits
    for power, gamma in itertools.product((True, False), (0.7, 1.0, 1.8)):
        rows = []
        for s, t, label in zip(student.tolist(), teacher.tolist(), y.tolist(), strict=True):
            p = [math.exp(x / 2) for x in s]
            q = [math.exp(x / 2) / sum(math.exp(v / 2) for v in t) for x in t]
            weights = [(1 + x) ** gamma - 1 if k == label else (x**gamma if power else x) for k, x in enumerate(q)]
            rows.append(-sum(w * math.log(x / sum(p)) for w, x in zip(weights, p, strict=True)))
        value = ofa_loss(student, teacher, y, gamma, 2.0, power, "none")
        torch.testing.assert_close(value, torch.tensor(rows, dtype=torch.float64))


def test_ofa_at_gamma_one_is_kd_plus_the_teachers_entropy(logits):
    student, teacher, y = logits
    q = softmax(teacher, 1)
    entropy = -(q * q.log()).sum(1)
    torch.testing.assert_close(
        ofa_loss(student, teacher, y, reduction="none"), kd_loss(student, teacher, 1.0, "none") + entropy
    )
    ours, theirs = (f(student, teacher) for f in (lambda s, t: ofa_loss(s, t, y), lambda s, t: kd_loss(s, t, 1.0)))
    torch.testing.assert_close(gradient(ours, student), gradient(theirs, student))


def test_ofa_gradient_is_the_weighted_difference(logits):
    student, teacher, y = logits
    gamma, temperature = 1.4, 2.0
    mask = one_hot(y, K).double()
    weight = (softmax(teacher / temperature, 1) + mask) ** gamma - mask
    expected = (weight.sum(1, keepdim=True) * softmax(student / temperature, 1) - weight) / (B * temperature)
    torch.testing.assert_close(gradient(ofa_loss(student, teacher, y, gamma, temperature), student), expected)


def test_ofa_target_weight_rises_with_the_teachers_confidence():
    student, y = torch.zeros(1, K, dtype=torch.float64), torch.tensor([0])
    teachers = [torch.tensor([[x, 0, 0, 0, 0]], dtype=torch.float64) for x in (-2.0, 0.0, 2.0, 4.0)]
    # For equal student logits every class costs log K: the value counts the weights.
    values = [ofa_loss(student, t, y, 1.5, nontarget_power=False).item() for t in teachers]
    assert all(low < high for low, high in itertools.pairwise(values))
    sure = torch.tensor([[1e4, 0, 0, 0, 0]], dtype=torch.float64)
    assert ofa_loss(student, sure, y, 1.5).item() == pytest.approx((2**1.5 - 1) * math.log(K))


def test_ofa_is_finite_where_the_released_code_is_not():
    student = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    value = ofa_loss(student, torch.tensor([[-1000.0, 1000.0]]), torch.tensor([1]), 1.5)
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()


# --- Plackett-Luce


def test_pld_equals_its_slow_twin(logits):
    student, teacher, y = logits
    rows = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), y.tolist(), strict=True):
        order = [label, *sorted((k for k in range(K) if k != label), key=lambda k, t=t: -t[k])]
        weights = [math.exp(x / 2) for x in t]
        total = 0.0
        for place, k in enumerate(order):
            left = sum(math.exp(s[j]) for j in order[place:])
            total += weights[k] / sum(weights) * (math.log(left) - s[k])
        rows.append(total)
    torch.testing.assert_close(pld_loss(student, teacher, y, 2.0, "none"), torch.tensor(rows, dtype=torch.float64))


def test_pld_with_a_certain_teacher_is_cross_entropy(logits):
    student, _, y = logits
    certain = one_hot(y, K).double() * 1e4
    torch.testing.assert_close(pld_loss(student, certain, y), cross_entropy(student, y))


def test_pld_of_two_classes_is_cross_entropy_weighted_by_confidence(logits):
    student, teacher, y = (logits[0][:, :2], logits[1][:, :2], logits[2] % 2)
    confidence = softmax(teacher, 1).gather(1, y[:, None])[:, 0]
    expected = confidence * cross_entropy(student, y, reduction="none")
    torch.testing.assert_close(pld_loss(student, teacher, y, reduction="none"), expected)


def test_pld_of_an_indifferent_teacher_is_the_mean_list_likelihood(logits):
    student, _, y = logits
    flat = torch.zeros(B, K, dtype=torch.float64)
    # Ties are broken by the order of classes.
    rows = []
    for s, label in zip(student.tolist(), y.tolist(), strict=True):
        order = [label, *(k for k in range(K) if k != label)]
        rows.append(sum(math.log(sum(math.exp(s[j]) for j in order[i:])) - s[k] for i, k in enumerate(order)) / K)
    torch.testing.assert_close(pld_loss(student, flat, y, reduction="none"), torch.tensor(rows, dtype=torch.float64))


def test_pld_is_convex_and_its_ranking_ignores_the_temperature(logits):
    student, teacher, y = logits
    other = student.detach().flip(0)
    for share in (0.2, 0.5, 0.9):
        between = pld_loss(share * student + (1 - share) * other, teacher, y)
        assert between <= share * pld_loss(student, teacher, y) + (1 - share) * pld_loss(other, teacher, y) + 1e-12
    # A student whose order is the teacher's, ever sharper, drives the loss to 0 at every temperature.
    ranked = one_hot(y, K).double() * 50 + teacher
    for temperature in (0.5, 4.0):
        values = [pld_loss(scale * ranked, teacher, y, temperature).item() for scale in (1, 10, 1000)]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 1e-6


# --- balanced divergences


def test_balance_of_one_is_the_symmetric_divergence(logits):
    student, teacher, y = logits
    expected = cross_entropy(student, y) + kd_loss(student, teacher, 2.0) + reverse_kd_loss(student, teacher, 2.0)
    torch.testing.assert_close(balanced_divergence_loss(student, teacher, y, 1.0, 2.0), expected)


def test_the_more_confident_is_pulled_by_the_other_divergence(logits):
    _, teacher, y = logits
    for scale, forward, backward in ((3.0, 2.0, 1.0), (0.3, 1.0, 2.0)):
        student = scale * teacher  # sharper, or flatter, than the teacher in every row
        expected = cross_entropy(student, y) + forward * kd_loss(student, teacher, 2.0)
        expected = expected + backward * reverse_kd_loss(student, teacher, 2.0)
        torch.testing.assert_close(balanced_divergence_loss(student, teacher, y, 2.0, 2.0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equally_confident_networks_may_be_exchanged(dtype, scale):
    """The same probabilities of other classes: of equal entropy, though rounding tells them apart."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        ours = scale * torch.randn(B, K, generator=g, dtype=dtype)
        theirs, y = ours[:, torch.randperm(K, generator=g)], torch.randint(K, (B,), generator=g)
        pulls = [
            balanced_divergence_loss(s, t, y, 2.0, 4.0, "none") - cross_entropy(s, y, reduction="none")
            for s, t in ((ours, theirs), (theirs, ours))
        ]
        expected = 1.5 * (kd_loss(ours, theirs, 4.0, "none") + reverse_kd_loss(ours, theirs, 4.0, "none"))
        for pull in pulls:
            torch.testing.assert_close(pull, expected, rtol=1e-4, atol=1e-4)


def test_the_smallest_gap_beyond_rounding_decides(logits):
    _, teacher, y = logits
    for scale, forward, backward in ((1.001, 2.0, 1.0), (0.999, 1.0, 2.0)):
        student = scale * teacher
        rows = cross_entropy(student, y, reduction="none") + forward * kd_loss(student, teacher, 2.0, "none")
        rows = rows + backward * reverse_kd_loss(student, teacher, 2.0, "none")
        found = balanced_divergence_loss(student, teacher, y, 2.0, 2.0, "none")
        torch.testing.assert_close(found, rows, rtol=0, atol=1e-15)


def test_at_equality_only_cross_entropy_pulls(logits):
    _, teacher, y = logits
    at = teacher.clone().requires_grad_()
    ours, label = balanced_divergence_loss(at, teacher, y), cross_entropy(at, y)
    torch.testing.assert_close(gradient(ours, at), gradient(label, at))


# --- TAID


def test_taid_at_the_ends(logits):
    student, teacher, _ = logits
    assert gradient(taid_loss(student, teacher, 0.0), student).abs().max() < 1e-15
    q = softmax(teacher, 1)
    expected = kd_loss(student, teacher, 1.0, "none") - (q * q.log()).sum(1)
    torch.testing.assert_close(taid_loss(student, teacher, 1.0, "none"), expected)
    ours, theirs = taid_loss(student, teacher, 1.0), kd_loss(student, teacher, 1.0)
    torch.testing.assert_close(gradient(ours, student), gradient(theirs, student))


def test_taid_gradient_is_p_minus_a_constant_target(logits):
    student, teacher, _ = logits
    t = torch.tensor(0.3, dtype=torch.float64)
    target = softmax(0.7 * student.detach() + 0.3 * teacher, 1)
    torch.testing.assert_close(
        gradient(taid_loss(student, teacher, t), student), (softmax(student, 1) - target).detach() / B
    )
    value = -(target * log_softmax(student, 1)).sum(1).mean()
    torch.testing.assert_close(taid_loss(student, teacher, 0.3), value)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_taid_gradcheck(t, logits):
    """For the student with the target held: for the gradient that is what it stands at."""
    student, teacher, _ = logits
    target = ((1 - t) * student + t * teacher).detach()
    assert torch.autograd.gradcheck(lambda s: taid_loss(s, target, 1.0), (student,))
    held = gradient(taid_loss(student, target, 1.0), student)
    torch.testing.assert_close(gradient(taid_loss(student, teacher, t), student), held)
    theirs = teacher.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: taid_loss(student.detach(), q, t), (theirs,))


def test_taid_is_finite_at_ten_thousand():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = taid_loss(student, torch.tensor([[-1e4, 1e4]]), 0.4)
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()
    half = taid_loss(student.bfloat16(), torch.tensor([[-1e4, 1e4]]).bfloat16(), 0.4)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t, y: ofa_loss(s, t, y, 0.0), "gamma"),
        (lambda s, t, y: pld_loss(s, t, y, 0.0), "temperature"),
        (lambda s, t, y: balanced_divergence_loss(s, t, y, 0.0), "delta"),
        (lambda s, t, y: taid_loss(s, t, 1.5), "t must be"),
        (lambda s, t, y: taid_loss(s, t[:1], 0.5), "same shape"),
    ],
)
def test_bad_arguments_are_refused(call, message, logits):
    with pytest.raises(ValueError, match=message):
        call(*logits)
