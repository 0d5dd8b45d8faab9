"""The composition: what reaches the loss, what gets gradients, what parts may bring, what is refused."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from distilling import CLASSES, MIXED, apart, distiller, images, net, play, prepared, weights
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, mse_loss

from visiondistill import Distiller
from visiondistill.augmentors import Mix
from visiondistill.data import Digits, Stream, TensorData
from visiondistill.engine import Optim, Run, Stage, Turn, train
from visiondistill.engine.errors import SettingsError
from visiondistill.eval import evaluate
from visiondistill.heads import SingleHead
from visiondistill.losses import dist_loss, dkd_loss, kd_loss, standardize_logits
from visiondistill.models import Network, SmallConvNet, SmallMLP
from visiondistill.parts import Part
from visiondistill.teachers import LiveTeacher, Online, Teacher
from visiondistill.terms import CE, DIST, DKD, KL, Hint, Needs, Term, View
from visiondistill.weighting import Fixed, Ramp, Weighting

# --- what the student's turn computes


def test_terms_are_the_weighted_losses_of_this_batch():
    method = distiller({"ce": CE(), "kd": KL(2.0), "hint": Hint(0, -1)}, weighting=Fixed({"ce": 0.1, "kd": 0.9}))
    batch = prepared(method)
    terms, carry = method.student_loss(batch)
    student, teacher = method.players["student"], method.frozen["teacher"]
    ours, theirs = student(batch["train"]["image"], (0,)), teacher(batch["train"]["image"], (1,))
    regressed = method.players["hint_regressor"](adaptive_avg_pool2d(ours.features[0], 4))
    expected = {
        "ce": 0.1 * cross_entropy(ours.logits, batch["train"]["label"]),
        "kd": 0.9 * kd_loss(ours.logits, theirs.logits, 2.0),
        "hint": mse_loss(regressed, theirs.features[1]),
    }
    torch.testing.assert_close(terms, expected)
    assert carry == {}


def test_label_smoothing_reaches_the_loss():
    plain, smooth = (distiller({"ce": CE(s)}, teacher=None).student_loss for s in (0.0, 0.3))
    batch = prepared(distiller({"ce": CE()}, teacher=None))
    logits = net(4, 5)(batch["train"]["image"]).logits
    expected = 0.7 * plain(batch)[0]["ce"] - 0.3 * logits.log_softmax(1).mean()
    torch.testing.assert_close(smooth(batch)[0]["ce"], expected)


def test_only_what_terms_need_is_computed():
    class Counting(Network):
        calls: list

        def forward(self, pixels, stages=(), embedding=False):
            self.calls.append(stages)
            return super().forward(pixels, stages, embedding)

    def counting(*widths: int) -> Counting:
        network = Counting(SmallConvNet(widths, num_classes=CLASSES), input_size=(1, 8, 8)).double()
        network.calls = []
        return network

    for terms, weights_, expected in [
        ({"ce": CE(), "kd": KL()}, {"kd": 0.0}, ([()], [])),
        ({"ce": CE(), "kd": KL()}, {}, ([()], [()])),
        ({"kd": KL(), "hint": Hint(0, 1), "last": Hint(-1, 1)}, {}, ([(0, 1)], [(1,)])),
        ({"kd": KL(), "hint": Hint(0, 1)}, {"hint": 0.0}, ([()], [()])),
    ]:
        student, teacher = counting(4, 5), counting(6, 9)
        with pytest.warns(UserWarning, match="left out") if not expected[1] else nullcontext():
            method = distiller(terms, student=student, teacher=teacher, weighting=Fixed(weights_))
        method.student_loss(prepared(method))
        assert (student.calls, teacher.calls) == expected


def test_ramps_follow_the_step_and_keep_their_term_at_zero():
    ramp = Ramp(start=0.0, end=0.8, steps=4, delay=2)
    assert [ramp.at(step) for step in (0, 2, 3, 6, 9)] == pytest.approx([0.0, 0.0, 0.2, 0.8, 0.8])
    method = distiller({"ce": CE(), "kd": KL()}, weighting=Fixed({"kd": ramp}))
    constant = distiller({"ce": CE(), "kd": KL()})
    for step in (0, 3, 9):
        terms, plain = (m.student_loss(prepared(m, step))[0] for m in (method, constant))
        torch.testing.assert_close(terms["kd"], ramp.at(step) * plain["kd"])
        torch.testing.assert_close(terms["ce"], plain["ce"])


# --- who gets gradients


def test_gradients_reach_student_and_regressor_but_not_the_teacher():
    method = distiller({"ce": CE(), "kd": KL(), "hint": Hint()})
    for parameter in method.frozen.parameters():
        parameter.requires_grad_(True)
    batch = prepared(method)
    for name, term in method.student_loss(batch)[0].items():
        trained = [p for player in method.players.values() for p in player.parameters()]
        gradients = torch.autograd.grad(term, trained, allow_unused=True, retain_graph=True)
        reached = {id(p) for p, g in zip(trained, gradients, strict=True) if g is not None and g.abs().max() > 0}
        own = {id(p) for p in method.players["hint_regressor"].parameters()}
        assert reached & {id(p) for p in method.players["student"].parameters()}
        assert (own <= reached) == (name == "hint")
    targets = batch["teacher"]
    assert not any(tensor.requires_grad for tensor in (targets["logits"], *targets["features"].values()))


def test_a_run_leaves_the_teacher_as_it_was(tmp_path):
    teacher = net(6, 9, norm="batch")
    method = distiller({"kd": KL(), "hint": Hint()}, teacher=teacher)
    before, student, regressor = weights(teacher), weights(method.players["student"]), method.players["hint_regressor"]
    moved = weights(regressor)
    result = play(method, tmp_path / "run")
    assert apart(before, weights(teacher)) == 0
    assert not any(part.training for part in teacher.modules())
    assert apart(student, weights(result.product)) > 0
    assert apart(moved, weights(regressor)) > 0


def test_the_product_is_the_students_own_network():
    method = distiller({"kd": KL(), "hint": Hint()})
    assert method.product() is method.players["student"]
    assert method.product().state_dict().keys() == net(4, 5).state_dict().keys()
    assert method.turns()[0].moves == ("student", "hint_regressor")


# --- limit cases


def test_kd_of_weight_zero_is_training_without_a_teacher(tmp_path):
    with pytest.warns(UserWarning, match="no term with a weight reads it"):
        muted = distiller({"ce": CE(), "kd": KL()}, weighting=Fixed({"kd": 0.0}))
    alone = distiller({"ce": CE()}, teacher=None)
    assert list(muted.frozen) == []
    results = [play(method, tmp_path / name).product for name, method in (("muted", muted), ("alone", alone))]
    assert apart(*map(weights, results)) == 0


def test_a_student_equal_to_its_teacher_stays(tmp_path):
    method = distiller({"kd": KL()}, student=net(6, 9, seed=5))
    run = train(
        [Stage(method, 6, {"student": Optim(name="sgd", lr=1.0)})],
        Run(output_dir=str(tmp_path / "run"), batch_size=4, progress=False, proof_window=0, device="cpu"),
    )
    assert apart(weights(run.product), weights(net(6, 9, seed=5))) < 1e-10


# --- images without a label


def test_cross_entropy_is_a_mean_over_labelled_images():
    """Over one epoch, whatever the batches: 5 of 12 images have a label."""
    method = distiller({"ce": CE()}, labelled=5, teacher=None)
    over_batches = sum(method.student_loss(prepared(method, step))[0]["ce"] for step in range(3)) / 3
    rows = images().rows(torch.arange(5))
    torch.testing.assert_close(over_batches, cross_entropy(net(4, 5)(rows["image"]).logits, rows["label"]))


def test_images_without_a_label_send_no_gradient_through_cross_entropy_but_through_kd():
    method = distiller({"ce": CE(), "kd": KL()}, labelled=5)
    batch = prepared(method)
    batch["train"]["image"].requires_grad_()
    terms, _ = method.student_loss(batch)
    unlabelled = batch["train"]["label"] < 0
    assert 0 < unlabelled.sum() < 4
    by_term = {
        name: torch.autograd.grad(term, batch["train"]["image"], retain_graph=True)[0] for name, term in terms.items()
    }
    assert (by_term["ce"][unlabelled] == 0).all()
    for name, rows in (("ce", ~unlabelled), ("kd", unlabelled)):
        assert (by_term[name][rows].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("labelled", [12, 5])
def test_any_split_into_micro_batches_is_the_same_run(tmp_path, labelled):
    curves = {}
    for count in (1, 2, 4):
        method = distiller({"ce": CE(), "kd": KL(), "hint": Hint()}, labelled=labelled, weighting=Fixed({"ce": 0.3}))
        torch.manual_seed(0)
        nn.init.constant_(method.players["hint_regressor"].weight, 0.1)
        nn.init.zeros_(method.players["hint_regressor"].bias)
        result = play(method, tmp_path / str(count), grad_accum_steps=count)
        curves[count] = torch.tensor([[line[f"student/{t}"] for t in ("ce", "kd", "hint")] for line in result.history])
    assert curves[1].shape == (6, 3)
    for count in (2, 4):
        torch.testing.assert_close(curves[count], curves[1], rtol=1e-10, atol=1e-12)


def test_a_term_between_rows_sees_the_whole_batch_however_it_is_split(tmp_path):
    curves = [play(distiller({"dist": DIST()}), tmp_path / str(n), grad_accum_steps=n).history for n in (1, 2)]
    whole, split = ([line["student/dist"] for line in curve] for curve in curves)
    assert split == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize(
    ("term", "loss"),
    [
        (KL(2.0, standardize=True), lambda s, t, y: kd_loss(standardize_logits(s), standardize_logits(t), 2.0)),
        (DKD(1.0, 2.0, 3.0), lambda s, t, y: dkd_loss(s, t, y, 1.0, 2.0, 3.0)),
        (
            DKD(standardize=True),
            lambda s, t, y: dkd_loss(standardize_logits(s), standardize_logits(t), y, 1.0, 8.0, 4.0),
        ),
        (DIST(2.0, 3.0, 4.0), lambda s, t, y: dist_loss(s, t, 2.0, 3.0, 4.0)),
    ],
)
def test_terms_are_their_losses(term, loss):
    method = distiller({"term": term})
    batch = prepared(method)
    student = method.players["student"](batch["train"]["image"]).logits
    expected = loss(student, batch["teacher"]["logits"], batch["train"]["label"])
    torch.testing.assert_close(method.student_loss(batch)[0]["term"], expected)


# --- the engine's promises, with this method


def test_one_graph_though_weights_ramp():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    terms = {"ce": CE(), "kd": KL(), "hint": Hint()}
    method = distiller(terms, labelled=5, weighting=Fixed({"kd": Ramp(0, 1, 5)}))
    compiled = torch.compile(method.turns()[0].loss, fullgraph=True, dynamic=False, backend=counter)
    for step in range(4):
        batch = prepared(method, step)
        torch.testing.assert_close(compiled(batch)[0], method.student_loss(batch)[0])
    assert counter.frame_count == 1


def test_a_continued_run_is_the_uninterrupted_one(tmp_path):
    def build() -> Distiller:
        return distiller(
            {"ce": CE(), "kd": KL()},
            labelled=5,
            student=net(4, 5, norm="batch"),
            weighting=Fixed({"kd": Ramp(0, 1, 5)}),
        )

    whole = play(build(), tmp_path / "whole", checkpoint_every=3, keep=3)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_000000003"
    again = play(build(), tmp_path / "again", resume=str(checkpoint))
    assert apart(weights(whole.product), weights(again.product)) == 0
    assert [line["student/kd"] for line in again.history[-3:]] == [line["student/kd"] for line in whole.history[-3:]]


def test_golden_curve(tmp_path, equals_golden):
    """20 steps in double precision."""
    method = distiller({"ce": CE(0.1), "kd": KL(4.0)}, labelled=7, weighting=Fixed({"ce": 0.1, "kd": Ramp(0, 0.9, 10)}))
    result = play(method, tmp_path / "run", steps=20, ema_decay=0.9)
    curve = {name: [line[f"student/{name}"] for line in result.history] for name in ("ce", "kd")}
    curve["average"] = [sum(tensor.sum().item() for tensor in result.ema.state_dict().values())]
    equals_golden("kd", curve)


# --- mixed images


def mixed(terms: dict[str, Term], labelled: int = 12) -> Distiller:
    return distiller(terms, labelled=labelled, augmentor=Mix(CLASSES))


def test_cross_entropy_takes_the_labels_of_mixed_images():
    method = mixed({"ce": CE(0.1), "kd": KL()})
    batch = prepared(method, step=MIXED)
    data = batch["train"]
    assert "label" not in data
    assert (data["target"] > 0).sum() > 4, "an image has both its classes"
    logits = method.players["student"](data["image"]).logits
    expected = cross_entropy(logits, data["target"], label_smoothing=0.1)
    torch.testing.assert_close(method.student_loss(batch)[0]["ce"], expected)


@pytest.mark.parametrize(("term", "labelled"), [(Needs(label=True), 12), (Needs(label=True, soft_label=True), 7)])
def test_mixed_labels_are_refused_where_they_do_not_fit(term, labelled):
    reader = CE()
    reader.needs = term
    with pytest.raises(SettingsError, match="mixes"):
        mixed({"reader": reader}, labelled)


# --- what parts may bring


class Memory(Term):
    """Keeps a running mean of the student's logits and pulls towards it."""

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs(per_sample=False)
        self.register_buffer("mean", torch.zeros(CLASSES, dtype=torch.float64))

    def setup(self, streams) -> None:
        self.mean.fill_(len(streams["train"].data))

    def forward(self, view: View) -> Tensor:
        view.carry["seen"] = view.logits.mean(0, keepdim=True)
        return (view.logits.mean(0) - self.mean).square().sum()

    def after(self, turn, carry):
        return {"mean": 0.5 * self.mean + 0.5 * carry["seen"].mean(0)} if turn == "student" else {}


class Learned(Weighting):
    """A player that learns to weight, in a turn of its own, on a stream of its own."""

    per_sample = True

    def __init__(self) -> None:
        super().__init__()
        self.players["gate"] = nn.Linear(1, 1).double()
        self.streams["val"] = Stream(images(), 4)

    def turns(self):
        return (Turn("weighting", self._loss, moves=("gate",)),)

    def _loss(self, batch):
        return {"match": (self.players["gate"](batch["val"]["label"][:, None].double()) - 1).square().mean()}, {}

    def forward(self, values, batch):
        return {name: (value * torch.ones_like(value)).mean() for name, value in values.items()}


def test_parts_bring_state_players_turns_and_streams(tmp_path):
    method = distiller({"kd": KL()}, weighting=Learned())
    assert [(turn.name, turn.moves) for turn in method.turns()] == [
        ("student", ("student",)),
        ("weighting", ("weighting_gate",)),
    ]
    assert set(method.streams) == {"train", "val"}
    gate = weights(method.players["weighting_gate"])
    result = play(method, tmp_path / "learned")
    assert apart(gate, weights(result.method.players["weighting_gate"])) > 0
    assert all(name.startswith("model.") for name in weights(result.product))


def test_state_is_set_up_written_after_the_turn_and_not_exported(tmp_path):
    method = distiller({"kd": KL(), "memory": Memory()})
    assert "parts.memory.mean" in method.state_dict()
    result = play(method, tmp_path / "run", steps=1, lr=0.0)
    batch = prepared(distiller({"kd": KL(), "memory": Memory()}))
    logits = net(4, 5)(batch["train"]["image"]).logits
    torch.testing.assert_close(result.method.parts["memory"].mean, 0.5 * 12 + 0.5 * logits.detach().mean(0))
    assert not any("mean" in name for name in result.product.state_dict())


class Inverted(Part):
    """An augmentor: negatives."""

    def prepare(self, batch, draw, due):
        return batch | {"train": batch["train"] | {"image": 1 - batch["train"]["image"]}}


def test_student_and_teacher_see_the_augmented_images():
    method = distiller({"kd": KL()}, augmentor=Inverted())
    batch, plain = prepared(method), prepared(distiller({"kd": KL()}))
    negative = 1 - plain["train"]["image"]
    torch.testing.assert_close(batch["train"]["image"], negative)
    torch.testing.assert_close(batch["teacher"]["logits"], method.frozen["teacher"](negative).logits)


# --- what is refused


class LogitsOnly(Teacher):
    def targets(self, data):
        return {"logits": data["image"].flatten(1)[:, :CLASSES], "features": {}}


def test_a_source_of_targets_need_not_be_a_network():
    method = distiller({"kd": KL()}, teacher=LogitsOnly())
    batch = prepared(method)
    expected = kd_loss(net(4, 5)(batch["train"]["image"]).logits, batch["train"]["image"].flatten(1)[:, :CLASSES])
    torch.testing.assert_close(method.student_loss(batch)[0]["kd"], expected)
    assert list(method.frozen) == []


shared = net(4, 5)


@pytest.mark.parametrize(
    ("terms", "parts", "message"),
    [
        ({"kd": KL()}, {"teacher": None}, "term 'kd' reads a teacher, but there is none"),
        ({"ce": None}, {}, "nothing to train on"),
        ({"kd": KL(), "peer": None}, {"teacher": Online(net(6, 9))}, "Online learns with the student, .* terms.Peer"),
        ({"ce": CE(), "kd": KL()}, {"labelled": 0}, r"term 'ce' reads labels, but no .* leave it out \(ce: null\)"),
        ({"hint": Hint()}, {"teacher": LogitsOnly()}, "term 'hint': LogitsOnly has no features, only logits"),
        ({"hint": Hint()}, {"student": SmallMLP(num_classes=3)}, "term 'hint': SmallMLP has no features by stage"),
        ({"hint": Hint(2)}, {}, "term 'hint': SmallConvNet has stages 0 to 1, got stage 2"),
        ({"hint": Hint()}, {"student": SmallConvNet()}, "classes"),
        ({"hint": Hint()}, {"student": SmallConvNet(num_classes=3)}, r"term 'hint': .* input_size \(C, H, W\)"),
        ({"ce": CE(head="second")}, {}, r"term 'ce' reads the head 'second', but there are only \['main'\]"),
        ({"memory": Memory()}, {"weighting": Learned()}, "Learned weights each image, but term 'memory'"),
        ({"ce": CE()}, {"weighting": Fixed({"kd": 1.0})}, r"weights are given for \['kd'\]; the terms are \['ce'\]"),
        ({"ce": CE()}, {"weighting": Fixed({"ce": 0.0})}, "nothing to train on"),
        ({}, {}, "nothing to train on"),
        ({"heads": CE()}, {}, r"terms cannot be called \['heads'\]"),
        ({"kd": KL()}, {"student": SmallConvNet(num_classes=4)}, "student tells 4 classes apart, the teacher 3"),
        ({"kd": KL()}, {"student": shared, "teacher": shared}, "share parameters"),
        ({"kd": KL()}, {"student": shared.model, "teacher": LiveTeacher(shared)}, "share parameters"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_named(terms, parts, message):
    with pytest.raises(SettingsError, match=message):
        distiller(terms, **parts)


def test_a_term_that_is_none_is_taken_away():
    assert distiller({"ce": None, "kd": KL()}).terms == ("kd",)


def test_a_set_without_labels_teaches_by_the_teacher_alone(tmp_path):
    bare = TensorData({"image": images().columns["image"]})
    build = {"teacher": net(6, 9, seed=5), "streams": {"train": Stream(bare, 4)}}
    with pytest.raises(SettingsError, match="term 'ce' reads labels, but no training image has one"):
        Distiller(**build, student=net(4, 5), terms={"ce": CE(), "kd": KL()})
    runs = [
        Distiller(**build, student=net(4, 5), terms={"kd": KL()}).double(),
        distiller({"kd": KL()}),
        distiller({"kd": KL()}, labelled=0),
    ]
    students = [weights(play(run, tmp_path / str(at)).product) for at, run in enumerate(runs)]
    assert apart(students[0], students[1]) == apart(students[0], students[2]) == 0


def test_batch_level_terms_with_labels_refuse_images_without():
    class Batchwise(CE):
        def __init__(self) -> None:
            super().__init__()
            self.needs = Needs(label=True, per_sample=False)

    with pytest.raises(SettingsError, match=r"term 'batchwise' needs the label of every image, but only 41\.7%"):
        distiller({"batchwise": Batchwise()}, labelled=5)


def test_the_train_stream_is_asked_for():
    with pytest.raises(SettingsError, match=r"streams must have \['train'\], got \['val'\]"):
        Distiller(student=net(4), terms={"ce": CE()}, streams={"val": Stream(images(), 4)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KL(temperature=0.0), "temperature"),
        (lambda: CE(label_smoothing=1.5), "label_smoothing"),
        (lambda: Fixed({"ce": math.nan}), "weight of term 'ce'"),
        (lambda: Fixed({"ce": Ramp(0, math.inf)}), "weight of term 'ce'"),
        (lambda: Ramp(steps=0), "steps >= 1"),
    ],
)
def test_unfit_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- it learns


def test_unlabelled_images_and_a_teacher_beat_few_labels(tmp_path):
    def trained(name: str, steps: int, lr: float, data: Digits, **parts) -> Network:
        torch.manual_seed(0)
        student = parts.pop("student")()
        method = Distiller(parts.pop("teacher", None), student=student, streams={"train": Stream(data, 32)}, **parts)
        run = Run(output_dir=str(tmp_path / name), batch_size=32, progress=False, device="cpu")
        return train([Stage(method, steps, {"student": Optim(lr=lr, schedule="cosine")})], run).product

    def big() -> Network:
        return Network(SmallConvNet((16, 32), "batch"))

    def small() -> Network:
        return Network(SmallMLP(64, (32,)))

    teacher = trained("teacher", 200, 1e-2, Digits("train"), student=big, terms={"ce": CE()})
    alone = trained("ce", 400, 2e-2, Digits("train", 5, "drop"), student=small, terms={"ce": CE()})
    both = trained(
        "kd",
        400,
        2e-2,
        Digits("train", 5),
        student=small,
        teacher=teacher,
        terms={"ce": CE(), "kd": KL()},
        weighting=Fixed({"ce": 0.1, "kd": 0.9}),
    )
    accuracy = [evaluate(network, Digits("val")).accuracy for network in (teacher, alone, both)]
    assert accuracy[0] > 0.9
    assert accuracy[1] + 0.05 < accuracy[2]
    assert accuracy[2] > 0.9


def test_the_default_parts_are_the_plain_ones():
    method = distiller({"ce": CE()}, teacher=None)
    assert isinstance(method.parts["heads"], SingleHead)
    assert isinstance(method.parts["weighting"], Fixed)
