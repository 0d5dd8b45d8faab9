"""A student with a distillation token: which loss reaches what, what it answers, and the file it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from distilling import CLASSES, distiller, images, net, play, prepared
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn.functional import cross_entropy

from visiondistill import Distiller, recipes
from visiondistill.data import Stream
from visiondistill.engine.errors import SettingsError
from visiondistill.export import export
from visiondistill.heads import DistilledHead
from visiondistill.losses import kd_loss
from visiondistill.models import Network, Timm
from visiondistill.terms import CE, KL, Hint, View
from visiondistill.terms.hard_label import HardLabel
from visiondistill.weighting import Fixed, Trilateral


def vit(seed: int = 0, dropout: float = 0.0) -> Network:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = VisionTransformerDistilled(**sizes, in_chans=1, num_classes=CLASSES, proj_drop_rate=dropout)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head_dist.weight)
    return Network(model, input_size=(1, 16, 16))


def deit(token=None, student=None, **parts):
    terms = {"ce": CE(), "token": token or HardLabel(head="distilled")}
    return distiller(terms, student=student or vit(), heads=DistilledHead(), **parts)


@pytest.mark.parametrize("token", [HardLabel(head="distilled"), KL(3.0, head="distilled")])
def test_each_loss_reaches_the_trunk_and_its_own_classifier_only(token) -> None:
    method = deit(token)
    terms, _ = method.student_loss(prepared(method))
    model = method.players["student"].model
    for name, own, other in (("ce", model.head, model.head_dist), ("token", model.head_dist, model.head)):
        trunk = [*model.blocks.parameters(), model.cls_token, model.dist_token]
        reached = [
            torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
            for parameters in (list(own.parameters()), list(other.parameters()), trunk)
        ]
        assert all(gradient is not None and gradient.any() for gradient in reached[0])
        assert all(gradient is None for gradient in reached[1])
        assert all(gradient is not None and gradient.any() for gradient in reached[2])


def test_the_terms_read_the_classifiers_of_their_tokens() -> None:
    method = deit(KL(3.0, head="distilled"))
    batch, model = prepared(method), method.players["student"].model
    tokens = model.forward_features(method.players["student"].prepare(batch["train"]["image"]))
    terms, _ = method.student_loss(batch)
    torch.testing.assert_close(terms["ce"], cross_entropy(model.head(tokens[:, 0]), batch["train"]["label"]))
    expected = kd_loss(model.head_dist(tokens[:, 1]), batch["teacher"]["logits"], 3.0)
    torch.testing.assert_close(terms["token"], expected)


def test_everyone_else_gets_the_mean_of_both() -> None:
    """A term with stages too: then logits come from another of the network's passes."""
    terms = {"ce": CE(), "token": HardLabel(head="distilled"), "hint": Hint(-1, -1)}
    method = distiller(terms, student=vit(), heads=DistilledHead())
    batch, student = prepared(method), method.players["student"]
    images = batch["train"]["image"]
    method.student_loss(batch)
    logits, outputs = method.parts["heads"](student, images, (1,), False)
    assert outputs.logits is logits["main"]
    for mode in (True, False):
        answer = student.train(mode)(images).logits
        torch.testing.assert_close(answer, (logits["main"] + logits["distilled"]) / 2)


def test_a_trunk_in_eval_mode_answers_apart_too_and_stays_in_it() -> None:
    """As a frozen one is, or the student in another player's turn."""
    method = deit(student=vit(dropout=0.5))
    student, batch = method.players["student"], prepared(method)
    student.eval()
    first, again = (method.student_loss(batch)[0] for _ in range(2))
    assert first == again
    assert not any(part.training for part in student.modules())
    student.train()
    assert method.student_loss(batch)[0] != method.student_loss(batch)[0], "dropout is on again"


def test_equals_official_code(shared_dir) -> None:
    """The released soft loss is also divided by the number of classes."""
    cases = torch.load(shared_dir / "reference_values" / "kd" / "deit_distillation.pt", weights_only=True)["cases"]
    assert {case["hyper"]["distillation_type"] for case in cases} == {"soft", "hard"}
    for case in cases:
        given, alpha = case["inputs"], case["hyper"]["alpha"]
        main, distilled = (given[name].clone().requires_grad_() for name in ("cls_logits", "dist_logits"))
        soft = case["hyper"]["distillation_type"] == "soft"
        token, share = (KL(case["hyper"]["tau"]), alpha / main.shape[1]) if soft else (HardLabel(), alpha)
        label = CE()(View(main, {}, label=given["labels"])).mean()
        fused = (1 - alpha) * label + share * token(View(distilled, {}, teacher_logits=given["teacher_logits"])).mean()
        torch.testing.assert_close(fused, case["outputs"]["loss"], rtol=1e-9, atol=1e-10)
        gradients = torch.autograd.grad(fused, (main, distilled))
        for name, gradient in zip(("cls_logits", "dist_logits"), gradients, strict=True):
            torch.testing.assert_close(gradient, case["grads"][name], rtol=1e-7, atol=1e-9)


def test_a_compiled_run_trains_both_classifiers_and_resumes_to_the_bit(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 3, "keep": 9, "compile": True, "compile_backend": "eager", "proof_window": 3}
    method = deit()
    model = method.players["student"].model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = play(method, tmp_path / "whole", **settings)
    assert not whole.proofs["main"].waiting
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    again = play(deit(student=vit(seed=1)), tmp_path / "again", resume=middle, **settings)
    ours, theirs = method.state_dict(), again.method.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_bilevel_turn_reads_the_student_in_eval_mode(tmp_path: Path) -> None:
    method = Distiller(
        net(6, 9, seed=5),
        student=vit(),
        terms={"ce": CE(), "kd": KL(), "token": HardLabel(head="distilled")},
        streams={"train": Stream(images(), 4), "val": Stream(images(), 4)},
        heads=DistilledHead(),
        weighting=Trilateral(every=2),
    ).double()
    assert not play(method, tmp_path, proof_window=3).proofs["main"].waiting


def test_timm_alone_opens_the_export_and_averages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2, "in_chans": 1}
    student = Timm("deit_tiny_distilled_patch16_224", num_classes=CLASSES, options=sizes)
    method = deit(student=student)
    play(method, tmp_path / "run")
    product = method.product().float()
    written = export(product, tmp_path / "export", classes=["a", "b", "c"])
    assert written.format == "timm"
    opened = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    assert type(opened) is VisionTransformerDistilled
    images = torch.randn(4, 1, 16, 16)
    tokens = opened.forward_features(images)
    torch.testing.assert_close(opened(images), (opened.head(tokens[:, 0]) + opened.head_dist(tokens[:, 1])) / 2)
    trained = {name: tensor.float() for name, tensor in method.players["student"].model.state_dict().items()}
    torch.testing.assert_close(dict(opened.state_dict()), trained, rtol=0, atol=0)


@pytest.mark.parametrize("head", DistilledHead.names)
def test_a_classifier_that_nothing_teaches_is_refused(head: str) -> None:
    """The exported student would average it all the same."""
    terms = {"ce": CE(head=head), "idle": HardLabel(head=({*DistilledHead.names} - {head}).pop())}
    with pytest.raises(SettingsError, match="no term with a weight reads"):
        distiller(terms, student=vit(), heads=DistilledHead(), weighting=Fixed({"idle": 0.0}))


def test_the_recipes_comment_says_how_to_match_probabilities() -> None:
    words = [word for line in recipes.about("deit").splitlines() if line.startswith("--") for word in line.split()]
    config = recipes.override(recipes.load("deit"), recipes.parse_overrides(words))
    recipes.check(config)
    made = config["method"]["init_args"]
    soft = {"class_path": "visiondistill.terms.KL", "init_args": {"temperature": 3.0, "head": "distilled"}}
    assert made["terms"]["token"] == soft
    assert made["weighting"]["init_args"]["weights"] == {"ce": 0.9, "token": 0.1}


def test_a_student_without_a_second_classifier_is_refused() -> None:
    message = r"no second classifier of its own.*deit_tiny_distilled.*DualHead"
    with pytest.raises(SettingsError, match=message):
        deit(student=net(4, 5))
    # Of a class that knows how to have two.
    alone = Network(timm.create_model("pit_ti_224", num_classes=CLASSES, img_size=32), input_size=(3, 32, 32))
    heads = DistilledHead()
    heads.connect(alone, None)
    with pytest.raises(SettingsError, match=message):
        heads(alone, torch.zeros(2, 3, 32, 32), (), False)


@pytest.mark.parametrize(("name", "size"), [("levit_128s", 64), ("pit_xs_distilled_224", 32)])
def test_other_families_answer_apart_as_well(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, img_size=size)
    student, heads = Network(model, input_size=(3, size, size)).eval(), DistilledHead()
    heads.connect(student, None)
    images = torch.rand(2, 3, size, size)
    logits, _ = heads(student, images, (), False)
    torch.testing.assert_close(student(images).logits, (logits["main"] + logits["distilled"]) / 2)
    assert not torch.equal(logits["main"], logits["distilled"])
