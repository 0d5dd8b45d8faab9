"""Trilateral weights: the hypergradient of one virtual step, and what the net may and may not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import CLASSES, MIXED, apart, images, net, play, prepared, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from visiondistill import Distiller
from visiondistill.augmentors import Mix
from visiondistill.data import Stream, TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.heads import DualHead
from visiondistill.losses import kd_loss
from visiondistill.models import Network
from visiondistill.teachers import Online
from visiondistill.terms import CE, DIST, KL, Hint, View
from visiondistill.weighting import Fixed, Trilateral
from visiondistill.weighting.trilateral import fusion_net


def method(norm: str = "group", labelled: int = 12, terms: dict | None = None, **changes) -> Distiller:
    torch.manual_seed(0)
    # A large virtual step, so that tolerances are small beside what it does.
    weighting = Trilateral(virtual_lr=0.1)
    given = {"teacher": net(6, 9, seed=5), "student": net(4, 5, norm=norm), "weighting": weighting} | changes
    streams = {"train": Stream(images(labelled), 4), "val": Stream(validation(), 6)}
    return Distiller(**given, terms=terms or {"ce": CE(), "kd": KL(2.0)}, streams=streams).double()


def validation() -> TensorData:
    data = images().columns
    return TensorData({"image": 1 - data["image"], "label": data["label"].flip(0)})


def wavy(module: nn.Module) -> None:
    """A net whose alpha differs from image to image."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))


def ready(distiller: Distiller) -> dict:
    """A prepared batch, with class means and a net that has something to say."""
    distiller.setup(distiller.streams)
    wavy(distiller.players["weighting_net"])
    stream = distiller.streams["val"]
    return prepared(distiller) | {"val": next(stream.open(0, [(0, 6)], 3))[0]}


def seen(distiller: Distiller, batch: dict) -> tuple[dict[str, Tensor], View]:
    values, view, _ = distiller.values(batch)
    return values, view


# --- alpha


def test_alpha_is_a_half_at_first_and_one_number_in_0_to_1_for_each_image() -> None:
    distiller = method()
    batch = prepared(distiller)
    weighting = distiller.parts["weighting"]
    assert torch.equal(weighting.shares(seen(distiller, batch)[1]), torch.full((4,), 0.5, dtype=torch.float64))
    wavy(distiller.players["weighting_net"])
    alpha = weighting.shares(seen(distiller, batch)[1])
    assert alpha.shape == (4,)
    assert 0 < alpha.min() < alpha.max() < 1


def test_a_constant_alpha_is_the_fixed_loss() -> None:
    ours, share = method(), 0.3
    with torch.no_grad():
        ours.players["weighting_net"][-1].bias.fill_(torch.tensor(share, dtype=torch.float64).logit())
    fixed = method(weighting=Fixed({"kd": share, "ce": 1 - share}))
    batch = prepared(ours)
    torch.testing.assert_close(ours.student_loss(batch)[0], fixed.student_loss(batch)[0], rtol=1e-12, atol=0)


def test_the_student_gets_each_images_own_loss_and_no_gradient_through_alpha() -> None:
    distiller = method()
    batch = ready(distiller)
    (alpha, logits, teacher), label = parts_of(distiller, batch), batch["train"]["label"]
    expected = {
        "kd": (alpha * kd_loss(logits, teacher, 2.0, "none")).mean(),
        "ce": ((1 - alpha) * cross_entropy(logits, label, reduction="none")).mean(),
    }
    terms, _ = distiller.student_loss(batch)
    torch.testing.assert_close(terms, expected)
    student = list(distiller.players["student"].parameters())
    ours = torch.autograd.grad(sum(terms.values()), student, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(sum(expected.values()), student))
    net_parameters = list(distiller.players["weighting_net"].parameters())
    assert torch.autograd.grad(sum(terms.values()), net_parameters, allow_unused=True) == (None,) * len(net_parameters)


def parts_of(distiller: Distiller, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Alpha as a constant, the student's logits with their graph, the teacher's."""
    _, view = seen(distiller, batch)
    return distiller.parts["weighting"].shares(view).detach(), view.logits, view.teacher_logits


def test_alpha_follows_its_image_through_a_permutation() -> None:
    distiller = method()
    batch = ready(distiller)
    order = torch.tensor([2, 0, 3, 1])
    other = {"train": {k: v[order] for k, v in batch["train"].items()}}
    other["teacher"] = {"logits": batch["teacher"]["logits"][order]}
    weighting = distiller.parts["weighting"]
    ours = weighting.shares(seen(distiller, batch)[1])
    torch.testing.assert_close(weighting.shares(seen(distiller, other)[1]), ours[order])
    assert not torch.allclose(ours, ours[order])


def test_other_terms_keep_their_weights() -> None:
    terms = {"ce": CE(), "kd": KL(2.0), "hint": Hint(0, -1)}
    distiller = method(terms=terms, weighting=Trilateral(weights={"hint": 0.25}))
    batch = prepared(distiller)
    values, _ = seen(distiller, batch)
    torch.testing.assert_close(distiller.student_loss(batch)[0]["hint"], 0.25 * values["hint"].mean())


# --- what it sees


def test_features_and_net_equal_released_code(shared_dir: Path) -> None:
    folder = shared_dir / "reference_values" / "kd"
    (case,) = torch.load(folder / "tgeo_state_and_controller.pt", weights_only=True)["cases"]
    given, expected = case["inputs"], case["outputs"]
    weighting = Trilateral()
    label, teacher = given["labels"], given["teacher_probs"]
    means = torch.stack([teacher[label == k].mean(0) for k in range(CLASSES)])
    weighting.register_buffer("class_means", means)
    released = fusion_net(27, (32, 16))
    names = {f"fc{i}.{kind}": f"{place}.{kind}" for i, place in ((1, 0), (2, 2), (3, 4)) for kind in ("weight", "bias")}
    released.load_state_dict({names[name]: tensor for name, tensor in given["controller_state_dict"].items()})
    weighting.players["net"] = released
    batch = {"train": {"label": label}}
    view = View(given["student_probs"].log(), batch, label=label, teacher_logits=teacher.log())
    torch.testing.assert_close(weighting.geometry(view), expected["state"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighting.shares(view), expected["alpha"][:, 0], rtol=1e-5, atol=1e-6)


def test_the_loss_equals_released_code_where_its_broadcast_does_no_harm(shared_dir: Path) -> None:
    """There [B, 1] times [B] is a product of means: what an alpha that is equal for all images gives."""
    file = shared_dir / "reference_values" / "kd" / "tgeo_weighted_loss.pt"
    for case in torch.load(file, weights_only=True)["cases"]:
        given = case["inputs"]
        student = given["student_logits"].clone().requires_grad_()
        values = {
            "kd": kd_loss(student, given["teacher_logits"], case["hyper"]["temperature"], "none"),
            "ce": cross_entropy(student, given["labels"], reduction="none"),
        }
        alpha = given["alpha"][:, 0].mean().expand(len(student))
        loss = sum(Trilateral()._weighted(values, View(student, {}), alpha).values())
        torch.testing.assert_close(loss, case["outputs"]["loss"], rtol=1e-9, atol=1e-10)
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        torch.testing.assert_close(gradient, case["grads"]["student_logits"], rtol=1e-9, atol=1e-10)
        by_image = sum(Trilateral()._weighted(values, View(student, {}), given["alpha"][:, 0]).values())
        assert abs(by_image - loss) > 1e-3, "each image has its own alpha"


def test_class_means_are_of_training_images_alone() -> None:
    distiller = method()
    distiller.setup({"train": distiller.streams["train"], "val": None})
    teacher, data = distiller.parts["teacher"], images().columns
    answers = teacher(data["image"]).softmax(1)
    expected = torch.stack([answers[data["label"] == k].mean(0) for k in range(CLASSES)])
    torch.testing.assert_close(distiller.parts["weighting"].class_means, expected)


def test_a_class_without_images_has_a_uniform_mean() -> None:
    distiller = method(labelled=2)
    distiller.setup(distiller.streams)
    means = distiller.parts["weighting"].class_means
    torch.testing.assert_close(means[2], torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))
    assert means[:2].std() > 1e-3


def test_an_image_without_label_has_no_truth_and_the_uniform_mean() -> None:
    distiller = method(labelled=6)
    batch = ready(distiller)
    batch["train"]["label"] = torch.tensor([0, -1, 1, -1])
    seen_by_net = distiller.parts["weighting"].geometry(seen(distiller, batch)[1])
    truth, means = seen_by_net[:, 2 * CLASSES : 3 * CLASSES], seen_by_net[:, 3 * CLASSES : 4 * CLASSES]
    assert truth.sum(1).tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(means[1::2], torch.full((2, CLASSES), 1 / CLASSES, dtype=torch.float64))


@pytest.mark.parametrize(("edges", "inter", "count"), [(("sg", "tg"), False, 5), (("st",), True, 7), ((), False, 3)])
def test_edges_and_class_means_can_be_left_out(edges: tuple[str, ...], inter: bool, count: int) -> None:
    distiller = method(weighting=Trilateral(edges=edges, inter_sample=inter))
    batch = ready(distiller)
    _, view = seen(distiller, batch)
    weighting = distiller.parts["weighting"]
    assert weighting.geometry(view).shape == (4, count * CLASSES)
    assert weighting.shares(view).shape == (4,)
    before = weighting.geometry(view)
    weighting.class_means.zero_()
    assert torch.equal(before, weighting.geometry(view)) is not inter


# --- the hypergradient


def hypergradient(distiller: Distiller, batch: dict) -> tuple[Tensor, ...]:
    (terms, _) = distiller.parts["weighting"].fusion_loss(batch)
    return torch.autograd.grad(terms["val"], list(distiller.players["weighting_net"].parameters()))


def full() -> Distiller:
    """With a second head and a regressor: the whole student's side is in the inner gradient."""
    terms = {"ce": CE(), "kd": KL(2.0, head="second"), "hint": Hint(0, -1)}
    return method(terms=terms, heads=DualHead(hidden=None))


@pytest.mark.parametrize("build", [method, full])
def test_it_equals_the_identity_of_one_step(build) -> None:
    """d L_val(theta') / d alpha_i = -(eta / B) <grad L_val(theta'), grad (KD_i - CE_i)>, here for all players moved."""
    distiller = build()
    batch = ready(distiller)
    distiller.eval()
    side, rate = distiller.parts["weighting"]._side[0], distiller.parts["weighting"].virtual_lr
    named = dict(side.named_parameters())
    values, view = seen(distiller, batch)
    alpha = distiller.parts["weighting"].shares(view)
    moving = list(named.values())
    loss = sum(distiller.student_loss(batch)[0].values())
    step = torch.autograd.grad(loss, moving, retain_graph=True)
    moved = {n: (p - rate * g).detach().requires_grad_() for (n, p), g in zip(named.items(), step, strict=True)}
    own = {n.removeprefix("players.student."): p for n, p in moved.items() if n.startswith("players.student.")}
    logits = functional_call(distiller.players["student"], own, (batch["val"]["image"],)).logits
    upper = cross_entropy(logits, batch["val"]["label"])
    torch.testing.assert_close(upper, distiller.parts["weighting"].fusion_loss(batch)[0]["val"])
    pull = torch.autograd.grad(upper, list(moved.values()), allow_unused=True)
    by_alpha = []
    for difference in values["kd"] - values["ce"]:
        each = torch.autograd.grad(difference, moving, retain_graph=True, allow_unused=True)
        products = [(a * b).sum() for a, b in zip(pull, each, strict=True) if a is not None and b is not None]
        by_alpha.append(-rate / len(alpha) * torch.stack(products).sum())
    expected = torch.autograd.grad(alpha, list(distiller.players["weighting_net"].parameters()), torch.stack(by_alpha))
    found = hypergradient(distiller, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert max(gradient.abs().max() for gradient in found) > 1e-6


def test_a_detached_alpha_would_teach_the_net_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = method()
    batch = ready(distiller)
    shares = Trilateral.shares
    # Still a function of the net, but without a derivative.
    monkeypatch.setattr(Trilateral, "shares", lambda self, view: shares(self, view).detach() + 0 * shares(self, view))
    assert all(not gradient.any() for gradient in hypergradient(distiller, batch))


def test_where_both_terms_are_the_same_alpha_makes_no_difference() -> None:
    same, other = method(terms={"ce": CE(), "kd": CE(), "third": KL(2.0)}), method()
    assert all(gradient.abs().max() < 1e-16 for gradient in hypergradient(same, ready(same)))
    assert any(gradient.abs().max() > 1e-6 for gradient in hypergradient(other, ready(other)))


# --- in a run


def test_only_the_net_moves_in_its_turn_and_statistics_stay(tmp_path: Path) -> None:
    distiller = method(norm="batch", weighting=Trilateral(every=3))
    before = weights(distiller.players["weighting_net"])
    plain = method(norm="batch", weighting=Fixed({"kd": 0.5, "ce": 0.5}))
    result = play(distiller, tmp_path / "ours", steps=1)
    play(plain, tmp_path / "plain", steps=1)
    assert apart(weights(distiller.players["student"]), weights(plain.players["student"])) < 1e-12
    assert apart(weights(distiller.players["weighting_net"]), before) > 0
    assert result.product is distiller.players["student"]


def test_the_net_moves_every_so_many_steps(tmp_path: Path) -> None:
    result = play(method(weighting=Trilateral(every=3)), tmp_path, steps=6)
    assert [row["step"] for row in result.history if "fusion/val" in row] == [1, 4]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_resumes_to_the_bit_and_is_one_graph(precision: str, tmp_path: Path) -> None:
    def made() -> Distiller:
        return method("batch").float()

    whole, again, compiled = made(), made(), made()
    wavy(again.players["weighting_net"].float())
    settings = {"mixed_precision": precision, "proof_window": 3}
    result = play(whole, tmp_path / "whole", checkpoint_every=3, keep=9, **settings)
    assert result.proofs["main"].reached["fusion/val"] == ["weighting_net"]
    play(again, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoints" / "step_000000003"), **settings)
    assert apart(weights(whole), weights(again)) == 0
    play(compiled, tmp_path / "compiled", compile=True, compile_backend="eager", **settings)
    assert apart(weights(whole), weights(compiled)) < 1e-5


def test_mixed_labels_are_mixed_truths(tmp_path: Path) -> None:
    distiller = method(augmentor=Mix(CLASSES))
    batch = prepared(distiller, step=MIXED)
    assert (batch["train"]["target"] > 0).sum() > 4, "an image has both its classes"
    seen_by_net = distiller.parts["weighting"].geometry(seen(distiller, batch)[1])
    torch.testing.assert_close(seen_by_net[:, 2 * CLASSES : 3 * CLASSES], batch["train"]["target"])
    play(distiller, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": Trilateral(teacher="dkd")}, "alpha is between two terms"),
        ({"weighting": Trilateral(weights={"kd": 0.5})}, "weights for other terms only"),
        ({"terms": {"ce": CE(), "kd": DIST()}}, "term 'kd' has one value for the whole batch"),
        ({"teacher": None, "terms": {"ce": CE(), "kd": CE()}}, "there is none"),
        ({"teacher": Online(net(6, 9))}, "a teacher that stays as it is"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        method(**changes)


def test_without_validation_images_it_is_refused() -> None:
    parts = {"teacher": net(6, 9), "student": net(4, 5), "terms": {"ce": CE(), "kd": KL()}}
    with pytest.raises(SettingsError, match=r"\['val'\]"):
        Distiller(**parts, weighting=Trilateral(), streams={"train": Stream(images(), 4)})


@pytest.mark.parametrize("wrong", [{"edges": ("ss",)}, {"virtual_lr": 0.0}])
def test_numbers_outside_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Trilateral(**wrong)


@pytest.mark.parametrize("compile_", [False, True])
def test_a_student_with_fused_attention_can_be_differentiated_twice(compile_: bool, tmp_path: Path) -> None:
    import timm

    student = Network(
        timm.create_model("test_vit", depth=2, num_classes=CLASSES, in_chans=1, img_size=32), input_size=(1, 32, 32)
    )
    distiller = method(student=student)
    play(distiller, tmp_path, steps=2, proof_window=0, compile=compile_, compile_backend="eager")
