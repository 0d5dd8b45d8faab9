"""Two classifiers on one trunk, and the alignment of their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import CLASSES, apart, distiller, play, prepared, weights
from torch import nn

from visiondistill import recipes
from visiondistill.engine import Optim, Result, Run, Stage, train
from visiondistill.engine.errors import SettingsError
from visiondistill.export import export
from visiondistill.heads import DualHead
from visiondistill.losses import binary_kl_norm_loss
from visiondistill.models import Network
from visiondistill.terms import CE, KL, BinaryKL
from visiondistill.weighting import Aligned, Fixed, Ramp


def dual(hidden: int | None = None, weighting=None, **heads):
    terms = {"ce": CE(), "logits": BinaryKL(head="second")}
    return distiller(terms, heads=DualHead(hidden, **heads), weighting=weighting)


def test_each_loss_reaches_the_trunk_and_its_own_head_only() -> None:
    method = dual()
    terms, _ = method.student_loss(prepared(method))
    student, second = method.players["student"], method.players["heads_second"]
    main = student.model.head
    for name, own, other in (("ce", main, second), ("logits", second, main)):
        reached = [
            torch.autograd.grad(terms[name], list(module.parameters()), retain_graph=True, allow_unused=True)
            for module in (own, other, student.model.stages)
        ]
        assert all(gradient is not None for gradient in reached[0])
        assert all(gradient is None for gradient in reached[1])
        assert all(gradient is not None for gradient in reached[2])


def test_the_second_head_reads_the_embedding() -> None:
    method = dual(hidden=7).eval()
    batch = prepared(method)
    terms, _ = method.student_loss(batch)
    embedding = method.players["student"](batch["train"]["image"], embedding=True).embedding
    logits = method.players["heads_second"](embedding)
    torch.testing.assert_close(terms["logits"], binary_kl_norm_loss(logits, batch["teacher"]["logits"]))
    kinds = [type(layer).__name__ for layer in method.players["heads_second"]]
    assert kinds == ["Linear", "Dropout", "BatchNorm1d", "ReLU", "Linear"], "dropout before the norm, as released"


def test_a_head_without_a_loss_is_refused() -> None:
    for terms, head in (({"ce": CE()}, "second"), ({"ce": CE(head="second")}, "main")):
        with pytest.raises(SettingsError, match=f"'{head}'.*no term with a weight reads"):
            distiller(terms, heads=DualHead(None), teacher=None)


def test_the_exported_student_is_the_plain_one() -> None:
    method = dual()
    assert method.product() is method.players["student"]
    assert not [name for name in method.product().state_dict() if "second" in name]


def test_both_heads_are_mixed_where_asked_for(tmp_path: Path) -> None:
    method = dual(inference="both", share=0.3, temperature=2.0).eval()
    product, pixels = method.product(), prepared(method)["train"]["image"]
    assert product is method.product()
    outputs = method.players["student"](pixels, embedding=True)
    second = method.players["heads_second"](outputs.embedding)
    expected = 0.3 * outputs.logits.softmax(1) + 0.7 * (second / 2.0).softmax(1)
    torch.testing.assert_close(product(pixels).softmax(1).double(), expected, rtol=1e-5, atol=1e-6)
    exported = export(product, tmp_path / "export", classes=["a", "b", "c"], input_size=(1, 8, 8))
    assert exported.format == "program"
    assert exported.largest_difference["program"] < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"share": 1.5}, "share"), ({"temperature": 0.0}, "temperature"), ({"inference": "second"}, "inference")],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualHead(**settings)


def test_a_network_without_embedding_is_refused() -> None:
    plain = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), input_size=(1, 8, 8))
    plain.model.num_classes = CLASSES
    with pytest.raises((SettingsError, TypeError), match="no features"):
        distiller({"ce": CE(), "logits": BinaryKL(head="second")}, student=plain, heads=DualHead(None))


# --- a loss that stops early, as a stage


def staged(folder: Path, stages: int, rate: float = 1e-2) -> Result:
    """The first stages of the recipe, small and on digits; `rate` of the second one."""
    small = {"class_path": "visiondistill.models.SmallConvNet", "init_args": {"widths": [4, 6]}}
    changes = {"data": {"class_path": "visiondistill.data.EmbeddedDigits"}, "student": small, "teacher": small}
    changes |= {"stages.both.steps": 6, "stages.label.steps": 6, "stages.both.optim.default.warmup": 1}
    changes |= {"stages.label.optim.student.lr": rate, "run.output_dir": str(folder), "run.batch_size": 16}
    changes |= {"run.device": "cpu", "run.progress": False, "run.proof_window": 0, "run.log_every": 1}
    plan = recipes.plan(recipes.override(recipes.load("dhkd_stages"), changes))
    return train(plan.stages[:stages], plan.run)


def test_the_student_goes_on_where_the_second_head_stopped(tmp_path: Path) -> None:
    # A rate that moves nothing shows what the second stage begins with.
    given = {"both": (1,), "still": (2, 1e-30), "label": (2,)}
    both, still, label = (staged(tmp_path / name, *arguments) for name, arguments in given.items())
    assert both.method.players.keys() == {"student", "heads_second"}
    assert both.history[-1].keys() >= {"student/ce", "student/logits"}
    assert apart(weights(still.product), weights(both.product)) == 0.0
    assert apart(weights(label.product), weights(both.product)) > 1e-3
    assert label.step == 12
    assert label.method.players.keys() == {"student"}
    assert not [name for name in label.method.state_dict() if "teacher" in name or "second" in name]
    assert "student/ce" in label.history[-1]
    assert "student/logits" not in label.history[-1]


# --- alignment


def groups(label: list[float], teacher: list[float]) -> dict:
    return {
        "label": {"a": torch.tensor(label[:2]), "b": torch.tensor(label[2:])},
        "teacher": {"a": torch.tensor(teacher[:2]), "b": torch.tensor(teacher[2:])},
    }


def test_a_gradient_that_agrees_is_left_alone() -> None:
    found = Aligned().combine(groups([1.0, 0, 2], [3.0, 5, 0.5]))
    assert torch.cat([found["a"], found["b"]]).tolist() == [4.0, 5.0, 2.5]


def test_a_gradient_that_opposes_loses_its_part_along_the_label() -> None:
    given = groups([1.0, 0, 2], [-3.0, 5, 0.5])
    found = Aligned().combine(given)
    label = torch.tensor([1.0, 0, 2])
    projected = torch.cat([found["a"], found["b"]]) - label
    assert torch.dot(projected, label).abs() < 1e-6
    torch.testing.assert_close(projected, torch.tensor([-3.0, 5, 0.5]) + 2.0 / 5.0 * label)


def test_a_label_gradient_of_zero_changes_nothing() -> None:
    found = Aligned().combine(groups([0.0, 0, 0], [-3.0, 5, 0.5]))
    assert torch.cat([found["a"], found["b"]]).tolist() == [-3.0, 5.0, 0.5]


def test_alignment_equals_official_code(shared_dir) -> None:
    cases = torch.load(shared_dir / "reference_values" / "kd" / "dhkd_gradient_alignment.pt", weights_only=True)[
        "cases"
    ]
    assert cases
    for case in cases:
        names, outputs = case["inputs"]["param_names"], case["outputs"]
        given = {
            group: dict(zip(names, outputs[key], strict=True))
            for group, key in (("label", "grad_ce"), ("teacher", "grad_kd"))
        }
        merged = Aligned().combine(given)
        for name, expected in zip(names, outputs["merged_grad"], strict=True):
            torch.testing.assert_close(merged[name], expected, rtol=1e-9, atol=1e-12)


def test_aligned_updates_are_those_of_hand_made_gradients(tmp_path: Path) -> None:
    method = dual(weighting=Aligned({"logits": 3.0}))
    student = method.players["student"]
    batch = prepared(method)
    moved = [*student.parameters(), *method.players["heads_second"].parameters()]
    terms, _ = method.student_loss(batch)
    assert set(terms) == {"label/ce", "teacher/logits"}
    by_hand = {
        group: dict(enumerate(torch.autograd.grad(terms[name], moved, retain_graph=True, materialize_grads=True)))
        for group, name in (("label", "label/ce"), ("teacher", "teacher/logits"))
    }
    expected = Aligned().combine(by_hand)
    before = [p.detach().clone() for p in moved]
    run = Run(str(tmp_path / "run"), 4, progress=False, device="cpu", log_every=1, proof_window=0)
    train([Stage(method, 1, {"default": Optim("momentum", lr=0.1, options={"momentum": 0.0})})], run)
    for place, (old, new) in enumerate(zip(before, moved, strict=True)):
        torch.testing.assert_close(old - new.detach(), 0.1 * expected[place], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", [Fixed, Aligned])
@pytest.mark.parametrize("hidden", [None, 7])
def test_without_weight_the_student_goes_the_way_of_labels_alone(hidden: int | None, weighting, tmp_path: Path) -> None:
    """Alpha = 0, to the bit, though the second head answers, draws its dropout and decays."""
    muted = dual(hidden, weighting({"logits": Ramp(0.0, 0.0, 1)}))
    alone = distiller({"ce": CE()}, teacher=None)
    assert set(muted.terms) == {"ce", "logits"}
    products = [play(method, tmp_path / str(n), proof_window=0).product for n, method in enumerate((muted, alone))]
    assert apart(*map(weights, products)) == 0.0


def test_both_sides_need_a_term() -> None:
    with pytest.raises(SettingsError, match="terms on both sides"):
        distiller({"ce": CE()}, teacher=None, weighting=Aligned())
    with pytest.raises(SettingsError, match="terms on both sides"):
        distiller({"ce": CE(), "kd": KL()}, weighting=Aligned({"kd": 0.0}))


def test_one_head_takes_both_losses_too(tmp_path: Path) -> None:
    method = distiller({"ce": CE(), "logits": BinaryKL()}, weighting=Fixed({"logits": 0.1}))
    before = weights(method.players["student"])
    play(method, tmp_path)
    assert any(not torch.equal(value, before[name]) for name, value in weights(method.players["student"]).items())
