"""Each loss against a slow twin, its identities, its limits and its extremes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from visiondistill.losses import (
    balanced_divergence_loss,
    binary_kl_loss,
    binary_kl_norm_loss,
    dist_loss,
    dkd_loss,
    kd_loss,
    ofa_loss,
    pld_loss,
    reverse_kd_loss,
    sinkhorn_loss,
    standardize_logits,
)

B, K = 5, 7
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t, y: kd_loss(s, t, 3.0),
    "reverse_kd": lambda s, t, y: reverse_kd_loss(s, t, 3.0),
    "dkd": lambda s, t, y: dkd_loss(s, t, y, 1.5, 2.5, 3.0),
    "dist": lambda s, t, y: dist_loss(s, t, 1.5, 2.5, 3.0),
    "standardized_kd": lambda s, t, y: kd_loss(standardize_logits(s), standardize_logits(t), 2.0),
    "ofa": lambda s, t, y: ofa_loss(s, t, y, 1.5, 2.0),
    "ofa_target_power": lambda s, t, y: ofa_loss(s, t, y, 1.5, 2.0, nontarget_power=False),
    "pld": lambda s, t, y: pld_loss(s, t, y, 2.0),
    "sinkhorn": lambda s, t, y: sinkhorn_loss(s, t, 2.0, 0.3, 5),
    "balanced": lambda s, t, y: balanced_divergence_loss(s, t, y, 3.0, 2.0),
}
OF_RAW_LOGITS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "binary_kl": lambda s, t, y: binary_kl_loss(s, t, 3.0),
    "binary_kl_norm": lambda s, t, y: binary_kl_norm_loss(s, t, 3.0),
}
"""A constant added to a row of logits changes these, on purpose."""
ALL = LOSSES | OF_RAW_LOGITS
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(B, K, generator=g, dtype=torch.float64)
    teacher = 3 * torch.randn(B, K, generator=g, dtype=torch.float64)
    return student, teacher, torch.randint(K, (B,), generator=g)


# --- slow twins: plain numbers, one row at a time, probabilities instead of logarithms of them


def probabilities(row: Tensor, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row.tolist()]
    return [x / sum(powers) for x in powers]


def slow_kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def slow_dkd(s: Tensor, t: Tensor, y: int, alpha: float, beta: float, temperature: float) -> float:
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    target_part = slow_kl([q[y], 1 - q[y]], [p[y], 1 - p[y]])
    rest_p = [x / (1 - p[y]) for k, x in enumerate(p) if k != y]
    rest_q = [x / (1 - q[y]) for k, x in enumerate(q) if k != y]
    return temperature**2 * (alpha * target_part + beta * slow_kl(rest_q, rest_p))


def slow_correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def test_kd_equals_its_slow_twin(logits):
    student, teacher, _ = logits
    forward, reverse = [], []
    for s, t in zip(student, teacher, strict=True):
        p, q = probabilities(s, 3.0), probabilities(t, 3.0)
        forward.append(9 * slow_kl(q, p))
        reverse.append(9 * slow_kl(p, q))
    values = [kd_loss(student, teacher, 3.0, "none"), reverse_kd_loss(student, teacher, 3.0, "none")]
    torch.testing.assert_close(torch.stack(values), torch.tensor([forward, reverse], dtype=torch.float64))


def test_dkd_equals_its_slow_twin(logits):
    rows = [slow_dkd(s, t, int(y), 1.5, 2.5, 3.0) for s, t, y in zip(*logits, strict=True)]
    torch.testing.assert_close(dkd_loss(*logits, 1.5, 2.5, 3.0, "none"), torch.tensor(rows, dtype=torch.float64))


def test_dist_equals_its_slow_twin(logits):
    student, teacher, _ = logits
    p = [probabilities(row, 3.0) for row in student]
    q = [probabilities(row, 3.0) for row in teacher]
    inter = sum(1 - slow_correlation(a, b) for a, b in zip(p, q, strict=True)) / B
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    intra = sum(1 - slow_correlation(list(a), list(b)) for a, b in columns) / K
    # The released eps of 1e-8 on the product of norms is what differs.
    assert dist_loss(student, teacher, 1.5, 2.5, 3.0).item() == pytest.approx(9 * (1.5 * inter + 2.5 * intra), rel=1e-5)


def slow_transport(student: Tensor, teacher: Tensor, temperature: float, epsilon: float, num_iters: int) -> float:
    """On exponentials, as in the paper, entry by entry."""
    p, q = ([probabilities(row, temperature) for row in side] for side in (student, teacher))
    cost = [[sum(abs(x - y) for x, y in zip(a, b, strict=True)) for b in q] for a in p]
    plan = [[math.exp(-c / epsilon) for c in row] for row in cost]
    for _ in range(num_iters):
        plan = [[x / sum(row) for x in row] for row in plan]
        columns = [sum(row[j] for row in plan) for j in range(len(q))]
        plan = [[x / total for x, total in zip(row, columns, strict=True)] for row in plan]
    return sum(x * c for row, costs in zip(plan, cost, strict=True) for x, c in zip(row, costs, strict=True))


@pytest.mark.parametrize(("epsilon", "num_iters"), [(0.1, 20), (0.5, 1), (2.0, 3)])
def test_sinkhorn_equals_its_slow_twin(epsilon, num_iters, logits):
    student, teacher, _ = logits
    expected = slow_transport(student, teacher, 2.0, epsilon, num_iters)
    assert sinkhorn_loss(student, teacher, 2.0, epsilon, num_iters).item() == pytest.approx(expected, rel=1e-10)


def two(yes: float) -> list[float]:
    return [yes, 1 - yes]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_losses_equal_their_slow_twins(temperature, logits):
    student, teacher, _ = logits
    plain, norm = [], []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = [(x / temperature, y / temperature) for x, y in zip(s, t, strict=True)]
        plain.append(temperature**2 * sum(slow_kl(two(sigmoid(y)), two(sigmoid(x))) for x, y in pairs))
        norm.append(temperature**2 * sum(slow_kl([0.5, 0.5], two(sigmoid(x - y))) for x, y in pairs))
    values = [loss(student, teacher, temperature, "none") for loss in (binary_kl_loss, binary_kl_norm_loss)]
    torch.testing.assert_close(torch.stack(values), torch.tensor([plain, norm], dtype=torch.float64))


def test_standardize_is_the_unbiased_z_score(logits):
    student, _, _ = logits
    z = standardize_logits(student)
    torch.testing.assert_close(z, (student - student.mean(1, keepdim=True)) / (student.std(1, keepdim=True) + 1e-7))


# --- identities


@pytest.mark.parametrize("name", ["kd", "reverse_kd", "dkd", "standardized_kd", "binary_kl", "binary_kl_norm"])
def test_divergences_vanish_with_their_gradient_at_equality_only(name, logits):
    student, teacher, y = logits
    at = teacher.clone().requires_grad_()
    value = ALL[name](at, teacher, y)
    (gradient,) = torch.autograd.grad(value, at)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-12
    assert ALL[name](student, teacher, y) > 0.1


def test_dist_at_equality_is_its_eps_only(logits):
    _, teacher, _ = logits
    assert 0 <= dist_loss(teacher, teacher).item() < 1e-4


def test_dist_rows_ignore_positive_affine_maps_of_probabilities(logits):
    _, teacher, _ = logits
    q = teacher.softmax(1)
    stretched = (0.4 * q + 0.6 / K).log()
    assert dist_loss(stretched, teacher, gamma=0.0).item() < 1e-6
    assert dist_loss(stretched.flip(1), teacher, gamma=0.0).item() > 0.1


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_constant_added_to_a_row_changes_nothing(loss, logits):
    student, teacher, y = logits
    at = student.clone().requires_grad_()
    value = loss(at, teacher, y)
    (gradient,) = torch.autograd.grad(value, at)
    assert gradient.sum(1).abs().max() < 1e-12 < gradient.abs().max()
    torch.testing.assert_close(loss(student + 5.0, teacher - 3.0, y), value.detach())


@every_loss
def test_a_permutation_of_classes_or_rows_changes_nothing(loss, logits):
    student, teacher, y = logits
    classes, rows = torch.randperm(K), torch.randperm(B)
    torch.testing.assert_close(loss(student[:, classes], teacher[:, classes], classes.argsort()[y]), loss(*logits))
    torch.testing.assert_close(loss(student[rows], teacher[rows], y[rows]), loss(*logits))


def test_kd_gradient_is_t_times_p_minus_q(logits):
    student, teacher, _ = logits
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, 3.0), student)
    difference = (student / 3).softmax(1) - (teacher / 3).softmax(1)
    torch.testing.assert_close(gradient, 3 * difference / B)


def test_kd_tends_to_matching_centred_logits_at_high_temperature(logits):
    student, teacher, _ = logits
    difference = student - teacher
    centred = difference - difference.mean(1, keepdim=True)
    limit = centred.square().sum(1).mean() / (2 * K)
    for loss in (kd_loss, reverse_kd_loss):
        torch.testing.assert_close(loss(student, teacher, 1e5), limit, rtol=1e-4, atol=0.0)


def test_kd_on_a_certain_teacher_is_cross_entropy(logits):
    student, _, y = logits
    certain = torch.nn.functional.one_hot(y, K).double() * 1e4
    torch.testing.assert_close(kd_loss(student, certain, 1.0), torch.nn.functional.cross_entropy(student, y))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_kl_norm_is_a_log_cosh_whose_gradient_is_bounded(temperature, logits):
    student, teacher, _ = logits
    student.requires_grad_()
    value = binary_kl_norm_loss(student, teacher, temperature)
    half = (student - teacher).detach() / (2 * temperature)
    torch.testing.assert_close(value.detach(), temperature**2 * half.cosh().log().sum(1).mean())
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, temperature / (2 * B) * half.tanh())


def test_binary_kl_gradient_is_t_times_the_difference_of_sigmoids(logits):
    student, teacher, _ = logits
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(binary_kl_loss(student, teacher, 3.0), student)
    torch.testing.assert_close(gradient, 3 * ((student / 3).sigmoid() - (teacher / 3).sigmoid()).detach() / B)


def test_reverse_kd_is_kd_with_the_roles_swapped(logits):
    student, teacher, _ = logits
    torch.testing.assert_close(reverse_kd_loss(student, teacher, 2.0), kd_loss(teacher, student, 2.0))


def test_kd_is_the_sum_of_the_decoupled_parts(logits):
    student, teacher, y = logits
    confidence = (teacher / 3).softmax(1).gather(1, y[:, None]).squeeze(1)
    target_part = dkd_loss(*logits, alpha=1.0, beta=0.0, temperature=3.0, reduction="none")
    rest_part = dkd_loss(*logits, alpha=0.0, beta=1.0, temperature=3.0, reduction="none")
    whole = kd_loss(student, teacher, 3.0, "none")
    torch.testing.assert_close(target_part + (1 - confidence) * rest_part, whole)


def test_non_target_part_ignores_the_targets_logit(logits):
    student, teacher, y = logits
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(dkd_loss(student, teacher, y, alpha=0.0, beta=1.0), student)
    assert gradient.gather(1, y[:, None]).abs().max() < 1e-15 < gradient.abs().max()


def test_standardized_losses_ignore_shift_and_scale(logits):
    student, _, _ = logits
    z = standardize_logits(student)
    torch.testing.assert_close(standardize_logits(3.0 * student + 7.0), z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(standardize_logits(-student), -z)


# --- derivatives


@every_loss
def test_gradcheck(loss, logits):
    student, teacher, y = logits
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, y), (student, teacher))


# --- reductions, shapes, errors


def test_mean_is_the_mean_of_the_rows(logits):
    student, teacher, y = logits
    for with_reduction in (
        lambda r: kd_loss(student, teacher, reduction=r),
        lambda r: reverse_kd_loss(student, teacher, reduction=r),
        lambda r: dkd_loss(student, teacher, y, reduction=r),
        lambda r: dist_loss(student, teacher, gamma=0.0, reduction=r),
        lambda r: ofa_loss(student, teacher, y, reduction=r),
        lambda r: pld_loss(student, teacher, y, reduction=r),
        lambda r: binary_kl_loss(student, teacher, reduction=r),
        lambda r: binary_kl_norm_loss(student, teacher, reduction=r),
        lambda r: balanced_divergence_loss(student, teacher, y, reduction=r),
    ):
        rows = with_reduction("none")
        assert rows.shape == (B,)
        torch.testing.assert_close(rows.mean(), with_reduction("mean"))


def test_bad_arguments_are_refused(logits):
    student, teacher, y = logits
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(1, 7\)"):
        kd_loss(student, teacher[:1])
    with pytest.raises(ValueError, match="temperature"):
        reverse_kd_loss(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match="reduction"):
        dkd_loss(student, teacher, y, reduction="sum")
    with pytest.raises(ValueError, match="reduction"):
        dist_loss(student, teacher, reduction="sum")
    with pytest.raises(ValueError, match="whole batch"):
        dist_loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match="2 classes"):
        dkd_loss(student[:, :1], teacher[:, :1], torch.zeros(B, dtype=torch.int64))
    for loss in (dkd_loss, pld_loss):
        with pytest.raises(ValueError, match=r"target must be \[B\] of logits \(5, 7\), got \(4,\)"):
            loss(student, teacher, y[:4])
    with pytest.raises(ValueError, match="2 classes"):
        standardize_logits(student[:, :1])


# --- extremes


def extreme(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at +-1e4: opposed, equal, one-hot, constant, and mild."""
    student = torch.zeros(5, 4)
    teacher = torch.zeros(5, 4)
    student[0], teacher[0] = torch.tensor([1e4, -1e4, 0, 5.0]), torch.tensor([-1e4, 1e4, 3.0, 0])
    student[1] = teacher[1] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    student[2, 3] = teacher[2, 0] = 1e4
    student[3], teacher[3] = -1e4, torch.tensor([1e4, 1e4, 1e4, -1e4])
    student[4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    if dtype == torch.float16:  # the derivative at a constant row, about 1e7, is beyond its range
        student[3, 0] = 1e4
    return student.to(dtype), teacher.to(dtype), torch.tensor([0, 1, 2, 3, 0])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_and_exact_at_ten_thousand(loss, dtype):
    student, teacher, y = extreme(dtype)
    exact = loss(student.double(), teacher.double(), y)
    student.requires_grad_()
    value = loss(student, teacher, y)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


@every_loss
def test_half_precision_inputs_are_computed_in_float32(loss, logits):
    student, teacher, y = (logits[0].bfloat16(), logits[1].bfloat16(), logits[2])
    torch.testing.assert_close(loss(student, teacher, y), loss(student.float(), teacher.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher, y), loss(student.float(), teacher.float(), y))


def test_a_constant_row_is_zero_with_its_true_derivative():
    row = torch.full((1, 100), 0.1, requires_grad=True)
    z = standardize_logits(row)
    assert (z == 0).all()
    (gradient,) = torch.autograd.grad(z[0, 0], row)
    torch.testing.assert_close(gradient[0, 0].item(), 1e7 * 0.99, rtol=1e-5, atol=0.0)


def test_dist_on_one_row_keeps_the_row_part_only():
    student, teacher = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1.0, 3.0]])
    whole, rows = dist_loss(student, teacher), dist_loss(student, teacher, gamma=0.0)
    torch.testing.assert_close(whole - rows, torch.tensor(1.0))
    torch.testing.assert_close(torch.autograd.grad(whole, student), torch.autograd.grad(rows, student))


def test_two_classes_leave_nothing_to_the_non_target_part():
    student, teacher = torch.randn(4, 2), torch.randn(4, 2)
    y = torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(dkd_loss(student, teacher, y, 1.0, 8.0, 2.0), kd_loss(student, teacher, 2.0))


@every_loss
def test_one_graph(loss, logits):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*logits), loss(*logits))
