"""The weights of teacher and label follow the share of the images that is left."""

from __future__ import annotations

import pytest
import torch
from distilling import distiller, images, net, prepared
from torch.nn.functional import cross_entropy

from visiondistill import Distiller, recipes
from visiondistill.data import OwnData, Pruned, Source, Stream
from visiondistill.engine.errors import SettingsError
from visiondistill.losses import kd_loss
from visiondistill.terms import CE, KL, BinaryKL
from visiondistill.weighting import ByFraction


def whole(**options) -> Source:
    return OwnData(images(), **{"val_fraction": 0, "test_fraction": 0} | options)


def built(data: Source | Stream, weighting: ByFraction | None = None, **terms) -> Distiller:
    stream = data if isinstance(data, Stream) else data.stream(3)
    parts = {"terms": {"ce": CE(), "kd": KL(2.0)} | terms, "weighting": weighting or ByFraction()}
    return Distiller(net(6, 9, seed=5), student=net(4, 5), streams={"train": stream}, **parts).double()


@pytest.mark.parametrize(("fraction", "share"), [(0.25, 0.875), (0.5, 0.75), (1.0, 0.5)])
def test_the_teacher_has_one_minus_half_of_what_is_left(fraction: float, share: float) -> None:
    method = built(Pruned(whole(), fraction))
    batch = prepared(method)
    logits = method.players["student"](batch["train"]["image"]).logits
    expected = {
        "ce": (1 - share) * cross_entropy(logits, batch["train"]["label"]),
        "kd": share * kd_loss(logits, batch["teacher"]["logits"], 2.0),
    }
    torch.testing.assert_close(method.student_loss(batch)[0], expected)


def test_a_set_that_is_whole_is_halved_between_both() -> None:
    method = distiller({"ce": CE(), "kd": KL()}, weighting=ByFraction())
    assert method.parts["weighting"].shares == {"kd": 0.5, "ce": 0.5}


def test_images_that_were_carved_off_count_as_left_out() -> None:
    source = whole(val_fraction=0.25)
    assert len(source.train()) == 9
    assert built(source).parts["weighting"].shares == {"kd": 0.625, "ce": 0.375}


def test_other_terms_keep_their_weights_and_names_can_be_chosen() -> None:
    weighting = ByFraction("soft", "ce", {"kd": 0.0, "logits": 0.3})
    method = built(Pruned(whole(), 0.5), weighting, soft=KL(2.0), logits=BinaryKL())
    assert set(method.terms) == {"ce", "soft", "logits"}
    batch = prepared(method)
    weighted, (plain, _, _) = method.student_loss(batch)[0], method.values(batch)
    for name, weight in (("ce", 0.25), ("soft", 0.75), ("logits", 0.3)):
        torch.testing.assert_close(weighted[name], weight * plain[name].mean())


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_one_word_changes_both_the_data_and_the_weights(fraction: float) -> None:
    """`--data.fraction` of the recipe."""
    small = {"class_path": "visiondistill.models.SmallConvNet", "init_args": {"widths": [4, 4]}}
    config = recipes.override(recipes.load("pruned"), {"teacher": small, "student": small, "data.fraction": fraction})
    config = recipes.override(config, {"data.source": {"class_path": "visiondistill.data.EmbeddedDigits"}})
    (stage,), _ = recipes.build(config)
    shares = stage.method.parts["weighting"].shares
    assert shares == pytest.approx({"kd": 1 - fraction / 2, "ce": fraction / 2}, abs=1e-3)


class Endless:
    """Batches of nobody knows what."""

    def __init__(self) -> None:
        self.batch_size = 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: built(whole(), ByFraction("soft")), r"two terms, \['soft', 'ce'\]; the terms are \['ce', 'kd'\]"),
        (lambda: built(whole(), ByFraction("kd", "kd")), "two terms"),
        (lambda: built(whole(), ByFraction(weights={"kd": 0.3})), "are weighted by the fraction"),
        (
            lambda: Distiller(
                net(6, 9),
                student=net(4, 5),
                terms={"ce": CE(), "kd": KL()},
                streams={"train": Endless()},
                weighting=ByFraction(),
            ),
            r"'weighting': Endless is no data\.Stream.*weighting\.Fixed",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(build, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build()
