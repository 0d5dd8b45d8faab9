"""Losses on features and on the whole batch: norm and direction, attention, relations, optimal transport."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from visiondistill.losses import attention_transfer_loss, nd_loss, rkd_loss, sinkhorn_loss

B, D, K = 6, 8, 4


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]


@pytest.fixture
def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(B, D, generator=g, dtype=torch.float64) for _ in range(2))
    means = torch.randn(K, D, generator=g, dtype=torch.float64)
    return student.requires_grad_(), teacher, means, torch.randint(K, (B,), generator=g)


# --- norm and direction


def test_nd_of_a_short_student_is_drawn_along_the_class_mean(features):
    student, teacher, means, y = features
    short = (1e-2 * student).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(nd_loss(short, teacher, means, y), short)
    torch.testing.assert_close(gradient, -normalize(means[y]) / (B * teacher.norm(dim=1, keepdim=True)))


def test_nd_of_a_long_student_is_a_cosine_without_pressure_on_the_norm(features):
    student, teacher, means, y = features
    long = (100 * student).detach().requires_grad_()
    value = nd_loss(long, teacher, means, y, "none")
    torch.testing.assert_close(value, 1 - cosine_similarity(long, means[y]))
    (gradient,) = torch.autograd.grad(value.sum(), long)
    assert (gradient * long).sum(1).abs().max() < 1e-12


def test_nd_is_zero_only_along_the_mean_and_at_least_as_long(features):
    _, teacher, means, y = features
    along = normalize(means[y]) * teacher.norm(dim=1, keepdim=True)
    assert nd_loss(1.0 * along, teacher, means, y).abs() < 1e-12
    assert nd_loss(2.0 * along, teacher, means, y).abs() < 1e-12
    assert nd_loss(0.5 * along, teacher, means, y) == pytest.approx(0.5)
    assert nd_loss(-along, teacher, means, y) == pytest.approx(2.0)


def test_nd_equals_a_loop_over_rows_of_both_kinds(features):
    student, teacher, means, y = features
    student = student.detach() * torch.tensor([0.1, 3.0] * (B // 2), dtype=torch.float64)[:, None]
    longer = student.norm(dim=1) > teacher.norm(dim=1)
    assert 0 < longer.sum() < B
    rows = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), y.tolist(), strict=True):
        mean = means[label].tolist()
        ours, theirs, length = (sum(x * x for x in v) ** 0.5 for v in (s, t, mean))
        rows.append(1 - sum(a * b for a, b in zip(s, mean, strict=True)) / length / max(ours, theirs))
    torch.testing.assert_close(nd_loss(student, teacher, means, y, "none"), torch.tensor(rows, dtype=torch.float64))


def test_nd_at_equal_norms_has_a_gradient_between_the_two_kinds(features):
    _, teacher, means, y = features
    student = (teacher * torch.tensor([1.0, -1.0] * (D // 2), dtype=torch.float64)).requires_grad_()
    assert torch.equal(student.norm(dim=1), teacher.norm(dim=1))
    value = nd_loss(student, teacher, means, y, "none")
    cosine = 1 - cosine_similarity(student, means[y])
    torch.testing.assert_close(value, cosine)
    (found,), (turning,) = (torch.autograd.grad(each.sum(), student) for each in (value, cosine))
    pulling = -normalize(means[y]) / teacher.norm(dim=1, keepdim=True)
    way = turning - pulling
    share = ((found - pulling) * way).sum(1) / way.square().sum(1)
    assert (share >= 0).all()
    assert (share <= 1).all()
    torch.testing.assert_close(found, pulling + share[:, None] * way)


def test_nd_ignores_the_means_lengths_and_turns_with_all(features):
    student, teacher, means, y = features
    value = nd_loss(student, teacher, means, y)
    torch.testing.assert_close(nd_loss(student, teacher, means * torch.rand(K, 1), y), value)
    turned = (x @ rotation(D) for x in (student, teacher, means))
    torch.testing.assert_close(nd_loss(*turned, y), value)


def test_nd_with_an_empty_class_or_feature_is_finite(features):
    student, teacher, means, y = features
    means[y[0]] = 0
    value = nd_loss(student, teacher, means, y, "none")
    assert value[0] == 1.0
    nothing = torch.zeros(B, D, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(nd_loss(nothing, torch.zeros(B, D).double(), means, y), nothing)
    assert not gradient.any(), "there is no length to grow up to"


# --- attention


def test_attention_equals_its_slow_twin():
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(3, c, 4, 4, generator=g, dtype=torch.float64) for c in (2, 5))
    rows = []
    for ours, theirs in zip(student, teacher, strict=True):
        maps = [(f**2).mean(0).flatten() for f in (ours, theirs)]
        rows.append(((maps[0] / maps[0].norm() - maps[1] / maps[1].norm()) ** 2).mean())
    torch.testing.assert_close(attention_transfer_loss(student, teacher, reduction="none"), torch.stack(rows))


def test_attention_ignores_scale_sign_and_channels():
    feature = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    assert attention_transfer_loss(-7 * feature, feature) < 1e-30
    assert attention_transfer_loss(feature.repeat(1, 2, 1, 1), feature[:, [2, 1, 3, 0]]) < 1e-30
    assert attention_transfer_loss(torch.zeros_like(feature), feature).isfinite()


def test_the_larger_attention_map_is_averaged_down():
    small = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert attention_transfer_loss(large, small) < 1e-30
    assert attention_transfer_loss(small, large) < 1e-30


# --- relations


def test_relations_equal_their_slow_twin(features):
    student, teacher, _, _ = features

    def huber(a: float, b: float) -> float:
        return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5

    def distances(x: Tensor) -> list[list[float]]:
        raw = [[float((a - b).norm()) for b in x] for a in x]
        mean = sum(map(sum, raw)) / (B * (B - 1))
        return [[d / mean for d in row] for row in raw]

    def cosine(x: Tensor, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        return float(cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0))

    ours, theirs = student.detach(), teacher[:, :5]
    pairs = [
        huber(a, b) for r, q in zip(distances(ours), distances(theirs), strict=True) for a, b in zip(r, q, strict=True)
    ]
    triples = [
        huber(cosine(ours, i, j, k), cosine(theirs, i, j, k)) for i in range(B) for j in range(B) for k in range(B)
    ]
    expected = 2.0 * sum(pairs) / B**2 + 3.0 * sum(triples) / B**3
    assert rkd_loss(ours, theirs, 2.0, 3.0).item() == pytest.approx(expected, rel=1e-9)


def test_relations_ignore_scale_rotation_and_shift_of_either_side(features):
    student, teacher, _, _ = features
    value = rkd_loss(student, teacher)
    assert value > 0.1
    for moved in (3 * student, student @ rotation(D), student + 5.0):
        torch.testing.assert_close(rkd_loss(moved, teacher), value)
    assert rkd_loss(2 * teacher @ rotation(D) - 1, teacher).abs() < 1e-12


def test_autocast_changes_no_digit_of_the_relations(features):
    student, teacher = features[0].detach().bfloat16(), features[1].bfloat16()
    value = rkd_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rkd_loss(student, teacher), value)


@pytest.mark.parametrize("equal", [2, 4])
def test_rows_that_are_equal_have_no_direction_between_them_and_pull_on_nothing(equal):
    rows, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:equal] = rows[0]
    rows.requires_grad_()
    (gradient,) = torch.autograd.grad(rkd_loss(rows, teacher), rows)
    assert gradient.abs().max() < 100


# --- optimal transport


def test_transport_of_one_row_is_its_distance():
    student, teacher = torch.randn(1, K, dtype=torch.float64), torch.randn(1, K, dtype=torch.float64)
    expected = ((student / 2).softmax(1) - (teacher / 2).softmax(1)).abs().sum()
    torch.testing.assert_close(sinkhorn_loss(student, teacher), expected)


def test_a_sharp_plan_at_equality_costs_nothing_in_any_order():
    logits = 3 * torch.eye(K, dtype=torch.float64)
    assert sinkhorn_loss(logits, logits, epsilon=1e-3, num_iters=50) < 1e-9
    assert sinkhorn_loss(logits, logits) > 1e-6, "an entropic plan leaks"
    # Transport looks for partners: it does not know which row was whose.
    torch.testing.assert_close(sinkhorn_loss(logits.flip(0), logits), sinkhorn_loss(logits, logits))


def test_the_plan_has_unit_columns():
    # With cost 1 everywhere the value is the plan's mass.
    student = torch.tensor([[1e4, 0.0, 0.0]] * 5, dtype=torch.float64)
    teacher = torch.tensor([[0.0, 1e4, 0.0]] * 5, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_loss(student, teacher), torch.tensor(2.0 * 5, dtype=torch.float64))


# --- all of them

CALLS = {
    "nd": lambda s, t: nd_loss(s, t, torch.eye(K, D, dtype=s.dtype), torch.tensor([0, 1, 2, 3, 0, 1])),
    "attention": lambda s, t: attention_transfer_loss(s.view(B, 2, 2, 2), t.view(B, 2, 2, 2)),
    "relations": lambda s, t: rkd_loss(s, t),
}
every = pytest.mark.parametrize("loss", CALLS.values(), ids=CALLS.keys())


@every
def test_gradcheck(loss, features):
    student, teacher, _, _ = features
    assert torch.autograd.gradcheck(loss, (student, teacher.clone().requires_grad_()))


@every
def test_half_precision_is_lifted_and_large_features_are_finite(loss, features):
    student, teacher = features[0].detach().bfloat16(), features[1].bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()))
    large = (1e4 * features[0].detach()).float().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(large, 1e4 * teacher.float()), large)
    assert gradient.isfinite().all()


@every
def test_one_graph(loss, features):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*features[:2]), loss(*features[:2]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nd_loss(x, x[:, :2], x, torch.zeros(B).long()), r"class means \[K, D\]"),
        (lambda x: attention_transfer_loss(x[..., None, None], x[..., None, None], p=3), "even"),
        (lambda x: attention_transfer_loss(x[:2, :, None, None], x[..., None, None]), "batch size"),
        (lambda x: rkd_loss(x[:2], x), "one batch"),
        (lambda x: sinkhorn_loss(x, x, epsilon=0.0), "epsilon"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(B, D))
