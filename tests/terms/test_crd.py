"""Contrast against memory: two steps as released, the draws, the banks, and that no split of a batch matters.

Run as a program it is one of two processes; see `test_two_processes_train_as_one`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import CLASSES, apart, distiller, images, net, play, prepared, weights
from together import play_together, work
from torch import Tensor
from torch.nn.functional import normalize

from visiondistill import Distiller
from visiondistill.augmentors import Mix
from visiondistill.data import Stream, TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.losses import crd_loss
from visiondistill.terms import CE, CRD, View

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def method(negatives: int = 6, **more) -> Distiller:
    return distiller({"crd": CRD(width=4, negatives=negatives)}, **more)


def ready(**more) -> Distiller:
    made = method(**more)
    made.setup(made.streams)
    return made


# --- equality with released code


def test_two_steps_equal_the_released_ones(shared_dir) -> None:
    """The first sets the normalisers, the second keeps them and sees the rows that the first has written."""
    (case,) = torch.load(shared_dir / "reference_values" / "kd" / "crd.pt", weights_only=True)["cases"]
    inputs, hyper = case["inputs"], case["hyper"]
    data = TensorData({"image": torch.zeros(hyper["num_data"], 1, 8, 8), "label": torch.arange(hyper["num_data"]) % 3})
    term = CRD(hyper["feat_dim"], hyper["K"], hyper["T"], hyper["momentum"])
    term.settle(net(4, 5), {"train": Stream(data, 4)})
    for name, embed in (("student", "embed_s"), ("teacher", "embed_t")):
        weight, bias = inputs[embed].values()
        head = torch.nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        term.players[f"{name}_head"] = head.double()
    term.double()
    term.student_bank.copy_(inputs["memory_v1"])
    term.teacher_bank.copy_(inputs["memory_v2"])
    assert torch.equal(inputs["contrast_index"][:, 0], inputs["index"])
    batch = {"train": {"index": inputs["index"]}, "crd.12": inputs["contrast_index"][:, 1:]}
    # It keeps the temperature in single precision.
    term.temperature = torch.tensor(hyper["T"]).item()
    for step in ("step1", "step2"):
        feature, expected = inputs["student_feat"].clone().requires_grad_(), case["outputs"][step]
        view = View(
            torch.zeros(4, 3), batch, student_embedding=feature, teacher_embedding=inputs["teacher_feat"].clone()
        )
        value = term(view).mean()
        torch.testing.assert_close(value, expected["loss"][0], rtol=1e-7, atol=1e-7)
        moved = [feature, term.players["student_head"].weight, term.players["teacher_head"].weight]
        gradients = torch.autograd.grad(value, moved)
        for gradient, name in zip(gradients, ("student_feat", "embed_s_weight", "embed_t_weight"), strict=True):
            torch.testing.assert_close(gradient, expected[f"grad_{name}"], rtol=1e-6, atol=1e-7)
        write(term, view.carry)
        torch.testing.assert_close(term.student_bank, expected["memory_v1"], **EXACT)
        torch.testing.assert_close(term.teacher_bank, expected["memory_v2"], **EXACT)
        assert term.student_normalizer.item() == pytest.approx(expected["Z_v1"], rel=1e-6)
        assert term.teacher_normalizer.item() == pytest.approx(expected["Z_v2"], rel=1e-6)


def write(term: CRD, carry: dict[str, Tensor]) -> None:
    for name, value in term.after("student", {k: v.detach() for k, v in carry.items()}).items():
        if isinstance(value, tuple):
            getattr(term, name)[value[0]] = value[1]
        else:
            getattr(term, name).copy_(value)


# --- the loss


def test_the_loss_equals_its_slow_twin() -> None:
    similarity = torch.linspace(-1, 1, 12, dtype=torch.float64).cos().view(3, 4)
    rows, noise = [], 3 / 20
    for row in similarity:
        odds = (row / 0.5).exp() / 7.0
        value = -(odds[0] / (odds[0] + noise + 1e-7)).log()
        rows.append(value - sum((noise / (o + noise + 1e-7)).log() for o in odds[1:]))
    z = torch.tensor(7.0, dtype=torch.float64)
    torch.testing.assert_close(crd_loss(similarity, z, 20, 0.5, "none"), torch.stack(rows))
    torch.testing.assert_close(crd_loss(similarity, z, 20, 0.5), torch.stack(rows).mean())


def test_the_loss_draws_the_pair_together_and_the_others_apart() -> None:
    similarity = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(9.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: crd_loss(s, z, 30), similarity)
    (gradient,) = torch.autograd.grad(crd_loss(similarity, z, 30), similarity)
    assert (gradient[:, 0] < 0).all()
    assert (gradient[:, 1:] > 0).all()


def test_the_loss_is_finite_far_out_and_refuses_nonsense() -> None:
    similarity = torch.tensor([[-1e3, 1e3, 0.0]], requires_grad=True)
    value = crd_loss(similarity, torch.tensor(1.0), 10)
    value.backward()
    assert value.isfinite()
    assert similarity.grad.isfinite().all()
    for call in (
        lambda: crd_loss(similarity[:, :1], torch.tensor(1.0), 10),
        lambda: crd_loss(similarity, torch.tensor(1.0), 0),
        lambda: crd_loss(similarity, torch.tensor(1.0), 10, 0.0),
        lambda: crd_loss(similarity, torch.tensor(1.0), 10, reduction="sum"),
    ):
        with pytest.raises(ValueError, match=r"similarity must be|temperature must be|reduction must be"):
            call()


# --- who is compared with whom


def test_the_others_are_of_other_classes_and_all_of_them() -> None:
    made = ready(negatives=12)
    labels, seen = made.streams["train"].data.columns["label"], {number: set() for number in range(CLASSES)}
    for step in range(30):
        batch = prepared(made, step)
        for label, others in zip(batch["train"]["label"].tolist(), batch["crd.12"], strict=True):
            assert (labels[others] != label).all()
            seen[label] |= set(others.tolist())
    for label, others in seen.items():
        assert others == set((labels != label).nonzero()[:, 0].tolist())


def test_images_without_a_label_are_nobodys_others() -> None:
    made = ready(negatives=12, labelled=6)
    drawn = torch.cat([prepared(made, step)["crd.12"].flatten() for step in range(30)])
    assert set(drawn.tolist()) == set(range(6))


def test_draws_hang_on_the_step_and_are_as_many_as_asked() -> None:
    made = ready(negatives=5)
    one, again, other = (prepared(made, step)["crd.5"] for step in (0, 0, 1))
    assert one.shape == (4, 5)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert prepared(ready(negatives=16384))["crd.12"].shape == (4, 12), "no more than there are images"


# --- the term and its state


def by_hand(made: Distiller, batch: dict, half: bool = False) -> Tensor:
    """The term in the first step; networks and heads in half precision, if asked for, and nothing else."""
    term, total = made.parts["crd"], 0.0
    pixels, index = batch["train"]["image"], batch["train"]["index"]
    compared = torch.cat([index[:, None], batch["crd.6"]], 1)
    for side, bank, network in (
        ("student", term.teacher_bank, made.players["student"]),
        ("teacher", term.student_bank, made.frozen["teacher"]),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            embedding = network(pixels, embedding=True).embedding
            vectors = made.players[f"crd_{side}_head"](embedding)
        similarity = torch.einsum("bd,bmd->bm", normalize(vectors.to(bank.dtype), dim=1), bank[compared])
        total = total + crd_loss(similarity, 12 * (similarity / 0.07).exp().mean().detach(), 12)
    return total


def test_the_term_compares_each_side_with_the_bank_of_the_other() -> None:
    made = ready()
    batch = prepared(made)
    torch.testing.assert_close(made.student_loss(batch)[0]["crd"], by_hand(made, batch))


def test_gradients_reach_both_heads_and_the_student_but_not_the_teacher() -> None:
    made = ready()
    for parameter in made.frozen.parameters():
        parameter.requires_grad_(True)
    made.student_loss(prepared(made))[0]["crd"].backward()
    silent = {name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()}
    frozen = {name for name, _ in made.named_parameters() if name.startswith("frozen")}
    assert silent == frozen | {"players.student.model.head.weight", "players.student.model.head.bias"}
    assert not any(tensor.requires_grad for tensor in made.parts["crd"].buffers())


def test_rows_move_after_the_update_and_the_normalisers_only_once(tmp_path: Path) -> None:
    made, batch_size = method(), 4
    play(made, tmp_path / "one", steps=1, proof_window=0)
    first = weights(made.parts["crd"])
    begun = weights(ready().parts["crd"])
    for bank in ("student_bank", "teacher_bank"):
        moved = (first[bank] != begun[bank]).any(1)
        assert moved.sum() == batch_size
        torch.testing.assert_close(first[bank][moved].norm(dim=1), torch.ones(batch_size).double())
    more = method()
    play(more, tmp_path / "more", steps=5)
    assert first["student_normalizer"] > 0
    before = weights(more.parts["crd"])
    noted = {name.removeprefix("crd."): t for name, t in more.student_loss(prepared(more, 9))[1].items()}
    assert torch.equal(noted["student_normalizer"], before["student_normalizer"])
    # A mean over micro-batches may be off by a rounding.
    write(more.parts["crd"], noted | {"student_normalizer": noted["student_normalizer"] + 1e-3})
    assert torch.equal(before["student_normalizer"], more.parts["crd"].student_normalizer)


def test_an_image_that_comes_twice_counts_with_its_mean() -> None:
    term = ready().parts["crd"]
    rows, vectors = torch.tensor([3, 5, 3]), normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
    z = torch.tensor(1.0, dtype=torch.float64)
    carry = {"index": rows, "student": vectors, "teacher": vectors, "student_normalizer": z, "teacher_normalizer": z}
    where, values = term.after("student", carry)["student_bank"]
    old = term.student_bank
    twice = normalize(0.5 * old[3] + 0.25 * (vectors[0] + vectors[2]), dim=0)
    torch.testing.assert_close(values, torch.stack([twice, normalize(0.5 * (old[5] + vectors[1]), dim=0), twice]))
    assert torch.equal(values[0], values[2])
    assert torch.equal(where, rows)


def test_micro_batches_are_one_update(tmp_path: Path) -> None:
    """From the second step on to rounding: in the first each micro-batch has a normaliser of its own."""
    whole, split = trained(tmp_path / "whole"), trained(tmp_path / "split", grad_accum_steps=2)
    assert apart(whole, split) < 1e-9
    first_whole, first_split = (
        trained(tmp_path / name, known=False, steps=1, lr=0.0, proof_window=0, **settings)
        for name, settings in (("a", {}), ("b", {"grad_accum_steps": 2}))
    )
    assert first_whole["parts.crd.student_normalizer"] > 0
    assert apart(first_whole, first_split) < 1e-9


def trained(folder: Path, known: bool = True, steps: int = 6, **settings) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = distiller({"ce": CE(), "crd": CRD(width=4, negatives=6)})
    if known:
        made.parts["crd"].student_normalizer.fill_(20.0)
        made.parts["crd"].teacher_normalizer.fill_(30.0)
    play(made, folder, steps=steps, noise_block=2, **settings)
    return weights(made)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return play_together(__file__, tmp_path_factory.mktemp("two"), ["crd"])["crd"]


def test_two_processes_train_as_one(by_two: list[dict[str, Tensor]], tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", known=False)
    assert apart(by_two[0], alone) < 1e-9
    assert apart(by_two[0], by_two[1]) == 0


def test_banks_and_normalisers_travel_with_the_checkpoint(tmp_path: Path) -> None:
    whole = method()
    play(whole, tmp_path / "run", checkpoint_every=3)
    again = method()
    play(again, tmp_path / "again", resume=str(tmp_path / "run" / "checkpoints" / "step_000000003"))
    assert apart(weights(whole), weights(again)) == 0


def test_the_product_is_the_student_alone() -> None:
    made = ready()
    assert made.turns()[0].moves == ("student", "crd_student_head", "crd_teacher_head")
    assert made.turns()[0].accumulate
    assert made.product().state_dict().keys() == net(4, 5).state_dict().keys()


def test_half_precision_stops_at_the_heads() -> None:
    """Scores are divided by a small temperature: the third digit of a similarity shows in the first of the loss."""
    made = ready().float()
    with torch.autocast("cpu", torch.bfloat16):
        batch = prepared(made)
        value = made.student_loss(batch)[0]["crd"]
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, by_hand(made, batch, half=True))
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.players.parameters())


# --- what is refused


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum in"):
        CRD(momentum=1.0)
    with pytest.raises(SettingsError, match="mixes"):
        method(augmentor=Mix(CLASSES))

    class Bare:
        batch_size = 4

        def open(self, *_):
            raise AssertionError

    with pytest.raises(SettingsError, match="'crd': the banks hold a row for each training image"):
        Distiller(net(6, 9), student=net(4, 5), terms={"crd": CRD()}, streams={"train": Bare()})
    one = TensorData({"image": images().columns["image"], "label": torch.zeros(12, dtype=torch.int64)})
    alike = Distiller(net(6, 9), student=net(4, 5), terms={"crd": CRD()}, streams={"train": Stream(one, 4)})
    with pytest.raises(SettingsError, match="of one class"):
        alike.setup(alike.streams)


if __name__ == "__main__":
    work(["crd"], lambda name, folder: trained(folder / name, known=False))
