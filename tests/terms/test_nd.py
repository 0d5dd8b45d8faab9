"""Norm and direction as a term: class means from the training images, the adapter, mixed labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import CLASSES, MIXED, distiller, images, net, play, prepared, weights
from torch import nn

from visiondistill.augmentors import Mix
from visiondistill.engine.errors import SettingsError
from visiondistill.losses import nd_loss
from visiondistill.teachers import Online
from visiondistill.terms import CE, KL, NormDirection
from visiondistill.weighting import Fixed


def ready(**parts):
    method = distiller({"ce": CE(), "nd": NormDirection()}, **parts)
    method.setup(method.streams)
    return method


def test_class_means_are_the_teachers_over_the_training_images() -> None:
    method = ready()
    data, teacher = images(), method.frozen["teacher"]
    embedding = teacher(data.columns["image"], embedding=True).embedding
    for number in range(CLASSES):
        mean = embedding[data.columns["label"] == number].mean(0)
        torch.testing.assert_close(method.parts["nd"].class_means[number], mean)


def test_images_without_a_label_count_in_no_mean() -> None:
    method = ready(labelled=6)
    data, teacher = images(6), method.frozen["teacher"]
    embedding = teacher(data.columns["image"][:6], embedding=True).embedding
    mean = embedding[data.columns["label"][:6] == 1].mean(0)
    torch.testing.assert_close(method.parts["nd"].class_means[1], mean)


def test_the_term_is_the_loss_through_the_adapter() -> None:
    method = ready()
    adapter = method.players["nd_adapter"].eval()
    batch = prepared(method)
    terms, _ = method.student_loss(batch)
    pixels, label = batch["train"]["image"], batch["train"]["label"]
    ours = adapter(method.players["student"](pixels, embedding=True).embedding)
    theirs = method.frozen["teacher"](pixels, embedding=True).embedding
    torch.testing.assert_close(terms["nd"], nd_loss(ours, theirs, method.parts["nd"].class_means, label))


def test_the_adapter_is_the_released_one() -> None:
    adapter = ready().players["nd_adapter"]
    assert [type(layer) for layer in adapter] == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert (adapter[0].num_features, adapter[1].p, adapter[2].out_features) == (5, 0.5, 9)


def test_equal_widths_need_no_adapter() -> None:
    assert "nd_adapter" not in ready(student=net(4, 9)).players


def test_mixed_labels_mix_the_means() -> None:
    method = ready(student=net(4, 9), augmentor=Mix(CLASSES))
    batch = prepared(method, step=MIXED)
    assert (batch["train"]["target"] > 0).sum() > 4, "an image has both its classes"
    terms, _ = method.student_loss(batch)
    pixels = batch["train"]["image"]
    ours = method.players["student"](pixels, embedding=True).embedding
    theirs = method.frozen["teacher"](pixels, embedding=True).embedding
    means = batch["train"]["target"].double() @ method.parts["nd"].class_means
    torch.testing.assert_close(terms["nd"], nd_loss(ours, theirs, means, torch.arange(len(means))))


def test_without_weight_it_is_the_base_method(tmp_path: Path) -> None:
    base = distiller({"ce": CE(), "kd": KL()})
    without = distiller({"ce": CE(), "kd": KL(), "nd": NormDirection()}, weighting=Fixed({"nd": 0.0}))
    play(base, tmp_path / "base")
    play(without, tmp_path / "without")
    ours, theirs = (weights(method.players["student"]) for method in (base, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_means_travel_with_the_checkpoint(tmp_path: Path) -> None:
    whole = distiller({"ce": CE(), "nd": NormDirection()})
    play(whole, tmp_path / "run", checkpoint_every=3)
    again = distiller({"ce": CE(), "nd": NormDirection()})
    play(again, tmp_path / "again", resume=str(tmp_path / "run" / "checkpoints" / "step_000000003"))
    assert torch.equal(again.parts["nd"].class_means, whole.parts["nd"].class_means)
    assert again.parts["nd"].class_means.abs().sum() > 0


def test_a_teacher_that_learns_has_no_class_means() -> None:
    with pytest.raises(SettingsError, match="class means are of a teacher that stays"):
        distiller({"nd": NormDirection()}, teacher=Online(net(6, 9)))
