"""What parts are offered beyond logits and one feature: embeddings, an online teacher, the turn as a function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import CLASSES, images, net, play, prepared, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from visiondistill import Distiller
from visiondistill.data import Stream
from visiondistill.engine.errors import SettingsError
from visiondistill.losses import balanced_divergence_loss, kd_loss
from visiondistill.models import Network, Timm
from visiondistill.parts import Part
from visiondistill.teachers import Online
from visiondistill.terms import CE, KL, BalancedDivergence, Hint, Needs, Peer, Term, View
from visiondistill.weighting import Fixed, Weighting

FAMILIES = {
    "resnet10t": 64,
    "vit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "convnext_atto": 64,
    "mixer_s32_224": 64,
    "mobilenetv3_small_050": 64,
    "tf_efficientnet_lite0": 64,
    "cifar_resnet8": 32,
    "cifar_mobilenetv2_half": 32,
}


def made(name: str) -> Network:
    torch.manual_seed(0)
    return Timm(name, num_classes=5, input_size=(3, FAMILIES[name], FAMILIES[name])).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_and_features_come_with_the_same_logits(name: str) -> None:
    network, pixels = made(name), torch.rand(2, 3, FAMILIES[name], FAMILIES[name])
    with torch.no_grad():
        plain, outputs = network(pixels), network(pixels, (1, 0), embedding=True)
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert set(outputs.features) == {0, 1}
    assert plain.embedding is None
    assert outputs.embedding.shape == (2, network.embedding_size())
    if not isinstance(network.model.get_classifier(), tuple):
        torch.testing.assert_close(network.model.get_classifier()(outputs.embedding), plain.logits)


def test_class_tokens_come_beside_the_maps() -> None:
    network, pixels = made("vit_tiny_patch16_224"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        outputs = network(pixels, (2,))
        tokens = network.model.forward_intermediates(
            network.prepare(pixels), indices=[2], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    assert outputs.features[2].shape == (2, 192, 4, 4)
    torch.testing.assert_close(outputs.prefixes[2], tokens[0][1])
    assert made("resnet10t")(pixels, (0,)).prefixes == {}


class Recorder(Term):
    """Keeps what it sees."""

    def __init__(self, **needs) -> None:
        super().__init__()
        self.needs, self.seen = Needs(**needs), []

    def forward(self, view: View) -> Tensor:
        self.seen.append(view)
        return view.logits.sum(1)


def test_terms_see_stages_in_the_order_that_they_ask_for_and_embeddings() -> None:
    term = Recorder(student_stages=(-1, 0), teacher_stages=(1,), student_embedding=True, teacher_embedding=True)
    method = Distiller(net(6, 9), student=net(4, 5), terms={"see": term}, streams={"train": Stream(images(), 4)})
    batch = prepared(method.double())
    method.student_loss(batch)
    (view,) = term.seen
    assert [feature.shape[1] for feature in view.student_features] == [5, 4]
    assert [feature.shape[1] for feature in view.teacher_features] == [9]
    assert view.student_embedding.shape == (4, 5)
    assert view.teacher_embedding.shape == (4, 9)
    assert view.student_embedding.requires_grad
    assert not view.teacher_embedding.requires_grad
    student, pixels = method.players["student"], batch["train"]["image"]
    torch.testing.assert_close(view.student_embedding, student(pixels, (), True).embedding)
    torch.testing.assert_close(student.model.get_classifier()(view.student_embedding), view.logits)


def test_an_embedding_that_a_network_lacks_is_refused_under_the_terms_name() -> None:
    plain = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), input_size=(1, 8, 8))
    terms = {"see": Recorder(student_embedding=True)}
    with pytest.raises(SettingsError, match="term 'see': Sequential has no features"):
        Distiller(student=plain, terms=terms, streams={"train": Stream(images(), 4)})


def test_a_teacher_file_may_move_between_a_run_and_its_resume(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from visiondistill.engine.errors import ResumeError

    def run(file: Path, seed: int, output: str, **settings) -> None:
        torch.manual_seed(seed)
        if not file.exists():
            save_file(Timm("cifar_resnet8", num_classes=CLASSES).model.state_dict(), file)
        teacher = Timm("cifar_resnet8", weights=str(file))
        student = net(4, 5).float()
        data = images()
        data.columns["image"] = data.columns["image"].float()
        method = Distiller(teacher, student=student, terms={"kd": KL()}, streams={"train": Stream(data, 4)})
        play(method, tmp_path / output, **settings)

    run(tmp_path / "here.safetensors", 1, "run", steps=4)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_000000004")
    (tmp_path / "here.safetensors").rename(tmp_path / "there.safetensors")
    run(tmp_path / "there.safetensors", 1, "again", steps=4, resume=checkpoint)
    with pytest.raises(ResumeError, match="hold other weights"):
        run(tmp_path / "other.safetensors", 2, "other", steps=4, resume=checkpoint)


# --- an online teacher


def mutual(**changes) -> Distiller:
    terms = {"ce": CE(), "kd": KL(2.0), "their_ce": Peer(CE()), "their_kd": Peer(KL(2.0))} | changes.pop("terms", {})
    given = {"teacher": Online(net(6, 9, seed=5)), "student": net(4, 5)} | changes
    return Distiller(**given, terms=terms, streams={"train": Stream(images(), 4)}).double()


def test_both_networks_learn_from_each_other_and_only_so() -> None:
    method = mutual()
    assert method.turns()[0].moves == ("student", "teacher")
    batch = prepared(method)
    assert "teacher" not in batch, "its answers need gradients: they are made in the turn"
    terms, _ = method.student_loss(batch)
    student, teacher = method.players["student"], method.players["teacher"]
    ours, theirs = (network(batch["train"]["image"]).logits for network in (student, teacher))
    label = batch["train"]["label"]
    expected = {
        "ce": cross_entropy(ours, label),
        "kd": kd_loss(ours, theirs, 2.0),
        "their_ce": cross_entropy(theirs, label),
        "their_kd": kd_loss(theirs, ours, 2.0),
    }
    torch.testing.assert_close(terms, expected)
    for name, learner, other in (("kd", student, teacher), ("their_kd", teacher, student)):
        reached = [
            torch.autograd.grad(terms[name], list(n.parameters()), retain_graph=True, allow_unused=True)
            for n in (learner, other)
        ]
        assert all(gradient is not None for gradient in reached[0])
        assert all(gradient is None for gradient in reached[1]), "what teaches gets no gradient"


def balanced(**changes) -> Distiller:
    """As the recipe `bdkd`: the student balances both divergences, the teacher is pulled towards the student."""
    terms = {"balanced": BalancedDivergence(2.0, 3.0), "their_ce": Peer(CE()), "their_kd": Peer(KL(3.0))}
    return mutual(terms={"ce": CE(), "kd": KL()} | terms, weighting=Fixed({"ce": 0.0, "kd": 0.0}), **changes)


def reached(value: Tensor, network: nn.Module) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, list(network.parameters()), retain_graph=True, allow_unused=True)


def test_balanced_divergences_send_the_peer_no_gradient_and_it_sends_none_back() -> None:
    method = balanced()
    batch = prepared(method)
    terms, _ = method.student_loss(batch)
    assert set(terms) == {"balanced", "their_ce", "their_kd"}
    student, teacher = method.players["student"], method.players["teacher"]
    ours, theirs = (network(batch["train"]["image"]).logits for network in (student, teacher))
    torch.testing.assert_close(terms["their_kd"], kd_loss(theirs, ours, 3.0))
    torch.testing.assert_close(
        terms["balanced"], balanced_divergence_loss(ours, theirs, batch["train"]["label"], 2.0, 3.0)
    )
    for name, learner, other in (("balanced", student, teacher), ("their_kd", teacher, student)):
        assert all(gradient is not None for gradient in reached(terms[name], learner))
        assert all(gradient is None for gradient in reached(terms[name], other))


def test_two_equal_networks_pull_each_other_nowhere() -> None:
    """At p = q, for both of them: what is left of the student's term is its cross-entropy."""
    method = balanced(teacher=Online(net(4, 5)))
    batch = prepared(method)
    terms, _ = method.student_loss(batch)
    student, teacher = method.players["student"], method.players["teacher"]
    label = cross_entropy(student(batch["train"]["image"]).logits, batch["train"]["label"])
    torch.testing.assert_close(reached(terms["balanced"], student), reached(label, student))
    assert any(gradient.abs().max() > 1e-3 for gradient in reached(label, student))
    assert all(gradient.abs().max() < 1e-14 for gradient in reached(terms["their_kd"], teacher))


def test_mutual_learning_trains_and_exports_the_student_alone(tmp_path: Path) -> None:
    method = mutual()
    before = {name: weights(method.players[name]) for name in ("student", "teacher")}
    result = play(method, tmp_path, steps=6)
    assert result.product is method.players["student"]
    for name, old in before.items():
        assert any(not torch.equal(value, old[key]) for key, value in weights(method.players[name]).items())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"teacher": net(6, 9)}, "teachers.Online"),
        ({"terms": {"hint": Peer}}, "reads features"),
        ({"terms": {"head": Peer}}, "reads the head"),
    ],
)
def test_peers_that_cannot_be_are_refused(parts: dict, message: str) -> None:
    terms = {"hint": Hint(0, 0), "head": Recorder(head="second")}
    with pytest.raises(SettingsError, match=message):
        mutual(
            **parts | ({"terms": {n: kind(terms[n]) for n, kind in parts["terms"].items()}} if "terms" in parts else {})
        )


# --- streams, weightings, the turn as a function


class Reader(Part):
    reads = ("val",)


def test_only_streams_that_somebody_reads_are_opened() -> None:
    streams = {name: Stream(images(), 4) for name in ("train", "val", "spare")}
    build = {"student": net(4, 5), "terms": {"ce": CE()}}
    assert set(Distiller(**build, streams=streams).streams) == {"train"}
    assert set(Distiller(**build, streams=streams, augmentor=Reader()).streams) == {"train", "val"}
    with pytest.raises(SettingsError, match=r"streams must have \['val'\]"):
        Distiller(**build, streams={"train": streams["train"]}, augmentor=Reader())


class Doubting(Weighting):
    """Weights each image by the teacher's confidence in the label."""

    per_sample = True
    needs = Needs(label=True, teacher_logits=True)

    def forward(self, values: dict[str, Tensor], view: View) -> dict[str, Tensor]:
        sure = view.teacher_logits.softmax(1).gather(1, view.label[:, None])[:, 0]
        return {name: (sure * value).mean() for name, value in values.items()}


def test_a_weighting_reads_what_it_asks_for() -> None:
    build = {"teacher": net(6, 9, seed=5), "student": net(4, 5), "streams": {"train": Stream(images(), 4)}}
    method = Distiller(**build, terms={"ce": CE()}, weighting=Doubting()).double()
    batch = prepared(method)
    terms, _ = method.student_loss(batch)
    sure = batch["teacher"]["logits"].softmax(1).gather(1, batch["train"]["label"][:, None])[:, 0]
    logits = method.players["student"](batch["train"]["image"]).logits
    each = cross_entropy(logits, batch["train"]["label"], reduction="none")
    torch.testing.assert_close(terms["ce"], (sure * each).mean())


class Bound(Fixed):
    def bind(self, side: nn.Module) -> None:
        self.kept = (side,)


def test_the_students_turn_is_a_function_of_its_players() -> None:
    weighting = Bound({"hint": 2.0})
    terms = {"ce": CE(), "kd": KL(), "hint": Hint(0, -1)}
    build = {"teacher": net(6, 9, seed=5), "student": net(4, 5), "streams": {"train": Stream(images(), 4)}}
    method = Distiller(**build, terms=terms, weighting=weighting).double()
    batch, (side,) = prepared(method), weighting.kept
    parameters = dict(side.named_parameters())
    assert {name.split(".")[1] for name in parameters} == {"student", "hint_regressor"}
    assert not any(name.startswith("parts.weighting.kept") for name in method.state_dict())
    plain, _, _ = method.values(batch)
    moved = {name: parameter.detach() + 0.01 for name, parameter in parameters.items()}
    values, _ = functional_call(side, moved, (batch,))
    assert all(not torch.equal(values[name], plain[name]) for name in plain)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(moved[name])
    torch.testing.assert_close(values, method.values(batch)[0])


class Grouped(Fixed):
    def combine(self, groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return groups["teacher"]

    def forward(self, values: dict[str, Tensor], view: View) -> dict[str, Tensor]:
        return {f"{'label' if name == 'ce' else 'teacher'}/{name}": value.mean() for name, value in values.items()}


def test_a_weighting_may_combine_gradients_of_groups(tmp_path: Path) -> None:
    build = {"teacher": net(6, 9, seed=5), "streams": {"train": Stream(images(), 4)}}
    grouped = Distiller(**build, student=net(4, 5), terms={"ce": CE(), "kd": KL()}, weighting=Grouped()).double()
    alone = Distiller(**build, student=net(4, 5), terms={"kd": KL()}).double()
    play(grouped, tmp_path / "grouped")
    play(alone, tmp_path / "alone")
    torch.testing.assert_close(weights(grouped.players["student"]), weights(alone.players["student"]))
