"""Probabilistic knowledge transfer: the loss by hand, what it ignores, and the term on whole batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distilling import distiller, net, play, prepared, weights
from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.terms.pkt import PKT, pkt_loss
from visiondistill.weighting import Weighting

B, D = 5, 4


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    student = torch.randn(B, D, generator=g, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(B, 7, generator=g, dtype=torch.float64)


def test_equals_its_slow_twin(features) -> None:
    def picks(rows: Tensor) -> list[list[float]]:
        kernel = [[(float(a @ b / (a.norm() * b.norm())) + 1) / 2 for b in rows] for a in rows]
        return [[value / sum(row) for value in row] for row in kernel]

    ours, theirs = (picks(side.detach()) for side in features)
    pairs = [(q, p) for row, other in zip(theirs, ours, strict=True) for q, p in zip(row, other, strict=True)]
    expected = sum(q * math.log(q / p) for q, p in pairs) / B**2
    assert pkt_loss(*features).item() == pytest.approx(expected, rel=1e-5)


def test_two_images_in_closed_form() -> None:
    """Cosine 0 against 1: a third picks the other image, where the teacher says a half."""
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    expected = torch.tensor(0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))).double() / 2
    torch.testing.assert_close(pkt_loss(student, teacher), expected, rtol=1e-6, atol=0)


def test_the_length_of_any_row_and_rotations_change_nothing(features) -> None:
    student, teacher = features
    value = pkt_loss(student, teacher)
    assert value > 1e-3
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    lengths = torch.rand(B, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(pkt_loss(lengths * student, 3 * teacher @ turn), value)
    same = teacher.clone().requires_grad_()
    lowest = pkt_loss(same, lengths * teacher @ turn)
    (gradient,) = torch.autograd.grad(lowest, same)
    assert lowest.abs() < 1e-15
    assert gradient.abs().max() < 1e-14, "probabilities sum to 1, so that equality is the minimum"


def test_gradcheck(features) -> None:
    student, teacher = features
    assert torch.autograd.gradcheck(pkt_loss, (student, teacher.clone().requires_grad_()))


@pytest.mark.parametrize("row", [0.0, 1e4, -1e15])
def test_empty_opposite_and_large_features_are_finite(features, row: float) -> None:
    student = features[0].detach().float()
    student[1] = row * student[0]
    student.requires_grad_()
    value = pkt_loss(student, 1e4 * features[1].float())
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.abs().max() < 100


def test_cosines_that_rounding_takes_below_minus_one_are_finite() -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    opposite = torch.cat([rows, -rows])
    assert pkt_loss(opposite, opposite.flip(0)[:, :4]).isfinite()


def test_half_precision_and_autocast_change_no_digit(features) -> None:
    student, teacher = features[0].detach().bfloat16(), features[1].bfloat16()
    value = pkt_loss(student.float(), teacher.float())
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pkt_loss(student, teacher), value)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"), [((1, 3), (1, 3), "larger batch"), ((2, 3), (3, 3), "one batch"), ((2,), (2,), "B")]
)
def test_one_image_and_other_shapes_are_refused(ours, theirs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pkt_loss(torch.randn(ours), torch.randn(theirs))


def test_the_term_reads_the_embeddings() -> None:
    method = distiller({"pkt": PKT()})
    batch = prepared(method)
    ours, theirs = (
        network(batch["train"]["image"], embedding=True).embedding
        for network in (method.players["student"], method.frozen["teacher"])
    )
    torch.testing.assert_close(method.student_loss(batch)[0]["pkt"], pkt_loss(ours, theirs))


class PerImage(Weighting):
    per_sample = True


def test_it_sees_the_whole_batch_and_has_no_value_for_each_image(tmp_path: Path) -> None:
    whole, split = (distiller({"pkt": PKT()}) for _ in range(2))
    assert not whole.turns()[0].accumulate
    play(whole, tmp_path / "whole")
    play(split, tmp_path / "split", grad_accum_steps=2)
    torch.testing.assert_close(weights(split.players["student"]), weights(whole.players["student"]))
    with pytest.raises(SettingsError, match="one value for the whole batch"):
        distiller({"pkt": PKT()}, weighting=PerImage())


def test_a_compiled_run_resumes_to_the_bit_and_leaves_the_plain_student(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 3, "keep": 9, "compile": True, "compile_backend": "eager"}
    whole = play(distiller({"pkt": PKT()}), tmp_path / "whole", **settings)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    other = distiller({"pkt": PKT()}, student=net(4, 5, seed=1))
    again = play(other, tmp_path / "again", resume=middle, **settings)
    assert all(torch.equal(again.method.state_dict()[name], value) for name, value in whole.method.state_dict().items())
    assert whole.history[-1]["student/pkt"] < whole.history[0]["student/pkt"]
    assert whole.product.state_dict().keys() == net(4, 5).state_dict().keys()
