"""Similarity-preserving distillation: the loss by hand, what it ignores, and the term on whole batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import distiller, net, play, prepared, weights
from torch import Tensor

from visiondistill.engine.errors import SettingsError
from visiondistill.terms.similarity import SimilarityPreserving, similarity_preserving_loss
from visiondistill.weighting import Weighting

B = 4


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    student = torch.randn(B, 3, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(B, 5, generator=g, dtype=torch.float64)


def test_equals_its_slow_twin(features) -> None:
    def similarities(feature: Tensor) -> list[list[float]]:
        rows = [[float((a * b).sum()) for b in feature] for a in feature]
        return [[value / sum(v**2 for v in row) ** 0.5 for value in row] for row in rows]

    pairs = zip(*(similarities(feature.detach()) for feature in features), strict=True)
    expected = sum((a - b) ** 2 for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)) / B**2
    assert similarity_preserving_loss(*features).item() == pytest.approx(expected, rel=1e-9)


def test_scale_and_rotation_of_either_side_change_nothing(features) -> None:
    student, teacher = features
    value = similarity_preserving_loss(student, teacher)
    assert value > 1e-3
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(similarity_preserving_loss(-1e-3 * student, 1e3 * teacher @ turn), value)
    assert similarity_preserving_loss(7 * teacher @ turn, teacher) < 1e-28


def test_it_is_largest_where_similar_images_are_made_opposite() -> None:
    """Two images: off the diagonal 1 and -1 against the other's, as far as unit rows reach with a positive diagonal."""
    alike = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    opposite = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    expected = torch.tensor(2 * (2 / 2**0.5) ** 2 / 4, dtype=torch.float64)
    torch.testing.assert_close(similarity_preserving_loss(alike, opposite), expected)


def test_gradcheck(features) -> None:
    student, teacher = features
    assert torch.autograd.gradcheck(similarity_preserving_loss, (student, teacher.clone().requires_grad_()))


@pytest.mark.parametrize("factor", [0.0, 1e4, 1e25])
def test_features_of_any_size_are_finite(features, factor: float) -> None:
    student = (factor * features[0].detach()).float().requires_grad_()
    value = similarity_preserving_loss(student, factor * features[1].float())
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_an_image_without_features_pulls_on_nothing(features) -> None:
    student = features[0].detach().clone()
    student[1] = 0
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(similarity_preserving_loss(student, features[1]), student)
    assert gradient.abs().max() < 100


def test_half_precision_and_autocast_change_no_digit(features) -> None:
    student, teacher = features[0].detach().bfloat16(), features[1].bfloat16()
    value = similarity_preserving_loss(student.float(), teacher.float())
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity_preserving_loss(student, teacher), value)


@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
def test_one_image_or_two_batches_are_refused(rows) -> None:
    with pytest.raises(ValueError, match="same 2 images or more"):
        similarity_preserving_loss(*(torch.randn(count, 3) for count in rows))


def test_the_term_is_the_sum_over_its_stages() -> None:
    method = distiller({"sp": SimilarityPreserving((0, -1), (-1, 0))})
    batch = prepared(method)
    ours, theirs = (
        network(batch["train"]["image"], (0, 1)).features
        for network in (method.players["student"], method.frozen["teacher"])
    )
    expected = similarity_preserving_loss(ours[0], theirs[1]) + similarity_preserving_loss(ours[1], theirs[0])
    terms, _ = method.student_loss(batch)
    torch.testing.assert_close(terms["sp"], expected)
    with pytest.raises(SettingsError, match="in pairs"):
        SimilarityPreserving((0,), (0, 1))


class PerImage(Weighting):
    per_sample = True


def test_it_sees_the_whole_batch_and_has_no_value_for_each_image(tmp_path: Path) -> None:
    whole, split = (distiller({"sp": SimilarityPreserving()}) for _ in range(2))
    assert not whole.turns()[0].accumulate
    play(whole, tmp_path / "whole")
    play(split, tmp_path / "split", grad_accum_steps=2)
    torch.testing.assert_close(weights(split.players["student"]), weights(whole.players["student"]))
    with pytest.raises(SettingsError, match="one value for the whole batch"):
        distiller({"sp": SimilarityPreserving()}, weighting=PerImage())


def test_a_compiled_run_resumes_to_the_bit_and_leaves_the_plain_student(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 3, "keep": 9, "compile": True, "compile_backend": "eager"}
    whole = play(distiller({"sp": SimilarityPreserving()}), tmp_path / "whole", **settings)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    other = distiller({"sp": SimilarityPreserving()}, student=net(4, 5, seed=1))
    again = play(other, tmp_path / "again", resume=middle, **settings)
    assert all(torch.equal(again.method.state_dict()[name], value) for name, value in whole.method.state_dict().items())
    assert whole.history[-1]["student/sp"] < whole.history[0]["student/sp"]
    assert whole.product.state_dict().keys() == net(4, 5).state_dict().keys()
