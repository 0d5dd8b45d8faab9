"""Knowledge review: modules and loss as released, who learns, what is left behind."""

from __future__ import annotations

import pytest
import torch
from distilling import distiller, net, prepared
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from visiondistill.engine.errors import SettingsError
from visiondistill.losses import hierarchical_context_loss
from visiondistill.models import Network, SmallConvNet
from visiondistill.terms import CE, ReviewKD, View
from visiondistill.terms.review import Fusion

EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def cases(shared_dir) -> dict:
    found = torch.load(shared_dir / "reference_values" / "kd" / "reviewkd.pt", weights_only=True)["cases"]
    return {case["name"]: case for case in found}


@pytest.fixture
def features() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(3, 2, side, side, generator=g, dtype=torch.float64) for side in (9, 4, 2, 1)]


def total(ours: list, theirs: list) -> torch.Tensor:
    return sum(hierarchical_context_loss(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_loss_equals_the_released_one(cases) -> None:
    compared = 0
    for name, case in cases.items():
        if not name.startswith("hcl"):
            continue
        ours = [feature.clone().requires_grad_() for feature in case["inputs"]["student_feats"]]
        value = total(ours, case["inputs"]["teacher_feats"])
        torch.testing.assert_close(value, case["outputs"]["loss"], **EXACT)
        if case.get("grads"):
            gradients = torch.autograd.grad(value, ours)
            torch.testing.assert_close(list(gradients), case["grads"]["student_feats"], **EXACT)
        compared += 1
    assert compared == 2


def test_the_term_equals_the_released_one(cases) -> None:
    """The whole chain, half-way through the released warm-up; the stem is dropped there."""
    case = cases["full_epoch10_of_20"]
    inputs, hyper = case["inputs"], case["hyper"]
    term = ReviewKD()
    levels = list(zip(hyper["in_channels"], hyper["out_channels"], strict=True))
    term.players["fusion"] = torch.nn.ModuleList(
        Fusion(before, hyper["in_channels"][-1], after, number > 0)
        for number, (before, after) in enumerate(reversed(levels))
    ).double()
    theirs, names = inputs["abfs_state_dict"], {"conv1": "enter", "conv2": "leave", "att_conv": "attend"}
    renamed = {".".join(names.get(part, part) for part in name.split(".")): tensor for name, tensor in theirs.items()}
    term.players["fusion"].load_state_dict(renamed)
    view = View(
        logits=torch.zeros(4, 2),
        batch={},
        student_features=tuple(inputs["student_feats"][1:]),
        teacher_features=tuple(inputs["teacher_preact_feats"][1:]),
        student_embedding=inputs["student_pooled"],
        teacher_embedding=inputs["teacher_pooled"],
    )
    value = term(view)
    assert value.shape == (4,)
    torch.testing.assert_close(0.5 * value.mean(), case["outputs"]["loss_kd"], **EXACT)


def test_the_players_are_the_released_modules(cases) -> None:
    """Numbers of channels as `connect` chooses them."""
    student = Network(SmallConvNet((5, 6, 7)), input_size=(1, 32, 32))
    teacher = Network(SmallConvNet((8, 9, 10)), input_size=(1, 32, 32))
    term = ReviewKD()
    term.connect(student, teacher)
    expected = cases["full_epoch10_of_20"]["inputs"]["abfs_state_dict"]
    found = [tuple(t.shape) for t in term.players["fusion"].state_dict().values()]
    assert found == [tuple(t.shape) for t in expected.values()]


def test_initial_weights_are_drawn_as_released() -> None:
    fusion = Fusion(48, 64, 32, fuses=True)
    for weight, inputs in ((fusion.enter[0].weight, 48), (fusion.leave[0].weight, 64 * 9)):
        assert weight.abs().max().item() == pytest.approx((3 / inputs) ** 0.5, rel=0.02)


# --- the loss


def test_the_loss_equals_its_slow_twin(features) -> None:
    """Sizes of 9, 4, 2 and 1 use three, two, one and no pooled level."""
    for feature in features:
        other = feature.cos()
        rows = []
        for a, b in zip(feature, other, strict=True):
            value, weights = mse_loss(a, b), 1.0
            for number, size in enumerate(size for size in (4, 2, 1) if size < feature.shape[-1]):
                share = 0.5 ** (number + 1)
                value = value + share * mse_loss(adaptive_avg_pool2d(a, size), adaptive_avg_pool2d(b, size))
                weights += share
            rows.append(value / weights)
        torch.testing.assert_close(hierarchical_context_loss(feature, other, "none"), torch.stack(rows))


def test_the_loss_is_zero_at_equality_only_and_differentiable(features) -> None:
    first = features[0][:, :, :3, :3]
    assert hierarchical_context_loss(first, first) == 0
    assert hierarchical_context_loss(first, first + 1e-3) > 0
    ours, theirs = first.clone().requires_grad_(), first.sin().requires_grad_()
    assert torch.autograd.gradcheck(hierarchical_context_loss, (ours, theirs))


def test_half_precision_is_lifted_and_shapes_must_agree(features) -> None:
    large = torch.full((1, 1, 3, 3), 1e4, dtype=torch.float16)
    torch.testing.assert_close(hierarchical_context_loss(large, -large), torch.tensor(4e8))
    with pytest.raises(ValueError, match=r"\(3, 2, 9, 9\) and \(3, 2, 4, 4\)"):
        hierarchical_context_loss(*features[:2])
    with pytest.raises(ValueError, match="reduction"):
        hierarchical_context_loss(large, large, "sum")


# --- the term


def test_gradients_reach_fusion_and_student_but_not_the_teacher() -> None:
    method = distiller({"review": ReviewKD((0, 1), (0, 1))})
    for parameter in method.frozen.parameters():
        parameter.requires_grad_(True)
    (value,) = method.student_loss(prepared(method))[0].values()
    value.backward()
    silent = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()}
    own = {name for name, _ in method.named_parameters() if not name.startswith("frozen")}
    assert silent & own == {"players.student.model.head.weight", "players.student.model.head.bias"}
    assert {name for name, _ in method.named_parameters()} - own <= silent


def test_shallow_levels_see_the_deeper_ones() -> None:
    method = distiller({"review": ReviewKD((0, 1), (0, 1))}).eval()
    fusion = method.players["review_fusion"]
    shallow, deep = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 4, 4).double()
    deep.requires_grad_()
    predicted, joined = fusion[2](shallow, deep, (8, 8))
    assert predicted.shape == (2, 6, 8, 8)
    assert joined.shape == (2, 5, 8, 8)
    (gradient,) = torch.autograd.grad(predicted.sum(), deep)
    assert gradient.abs().min() > 0


def test_the_product_is_the_student_alone() -> None:
    method = distiller({"ce": CE(), "review": ReviewKD((0, 1), (0, 1))})
    assert method.turns()[0].moves == ("student", "review_fusion")
    assert method.product().state_dict().keys() == net(4, 5).state_dict().keys()


def test_half_precision_is_finite() -> None:
    method = distiller({"review": ReviewKD((0, 1), (0, 1))}).float()
    batch = prepared(method)
    batch["teacher"] = {
        "features": {stage: 1e4 * f.float() for stage, f in batch["teacher"]["features"].items()},
        "embedding": 1e4 * batch["teacher"]["embedding"].float(),
    }
    with torch.autocast("cpu", torch.bfloat16):
        (value,) = method.student_loss(batch)[0].values()
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.players.parameters())


@pytest.mark.parametrize("stages", [((0,), (0, 1)), ((), ())])
def test_stages_come_in_pairs(stages) -> None:
    with pytest.raises(SettingsError, match="in pairs"):
        ReviewKD(*stages)
