"""Terms over stages, embeddings and the whole batch: what they compute, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import distiller, play, prepared, weights

from visiondistill.engine.errors import SettingsError
from visiondistill.losses import (
    attention_transfer_loss,
    balanced_divergence_loss,
    binary_kl_loss,
    binary_kl_norm_loss,
    pld_loss,
    rkd_loss,
    sinkhorn_loss,
)
from visiondistill.terms import (
    PLD,
    RKD,
    AttentionTransfer,
    BalancedDivergence,
    BinaryKL,
    Sinkhorn,
    Term,
)
from visiondistill.weighting import Weighting


def answered(method):
    """(prepared batch, the student's outputs, the teacher's)."""
    batch = prepared(method)
    pixels = batch["train"]["image"]
    ours, theirs = (n(pixels, (0, 1), embedding=True) for n in (method.players["student"], method.frozen["teacher"]))
    return batch, ours, theirs


TERMS: dict[str, tuple] = {
    "pld": (PLD(2.0), lambda o, t, y: pld_loss(o.logits, t.logits, y, 2.0)),
    "binary": (BinaryKL(3.0, norm=False), lambda o, t, y: binary_kl_loss(o.logits, t.logits, 3.0)),
    "binary_norm": (BinaryKL(3.0), lambda o, t, y: binary_kl_norm_loss(o.logits, t.logits, 3.0)),
    "balanced": (
        BalancedDivergence(3.0, 2.0),
        lambda o, t, y: balanced_divergence_loss(o.logits, t.logits, y, 3.0, 2.0),
    ),
    "sinkhorn": (Sinkhorn(1.0, 0.2, 3), lambda o, t, y: sinkhorn_loss(o.logits, t.logits, 1.0, 0.2, 3)),
    "rkd": (RKD(2.0, 3.0), lambda o, t, y: rkd_loss(o.embedding, t.embedding, 2.0, 3.0)),
    "attention": (
        AttentionTransfer((0, -1), (1, -1)),
        lambda o, t, y: (
            attention_transfer_loss(o.features[0], t.features[1])
            + attention_transfer_loss(o.features[1], t.features[1])
        ),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_loss(name: str) -> None:
    term, expected = TERMS[name]
    method = distiller({"it": term})
    batch, ours, theirs = answered(method)
    terms, _ = method.student_loss(batch)
    torch.testing.assert_close(terms["it"], expected(ours, theirs, batch["train"]["label"]))


@pytest.mark.parametrize("term", [Sinkhorn(), RKD()])
def test_terms_between_rows_see_the_whole_batch(term: Term, tmp_path: Path) -> None:
    whole, split = (distiller({"it": type(term)()}) for _ in range(2))
    assert not whole.turns()[0].accumulate
    play(whole, tmp_path / "whole")
    play(split, tmp_path / "split", grad_accum_steps=2)
    torch.testing.assert_close(weights(split.players["student"]), weights(whole.players["student"]))


class PerImage(Weighting):
    per_sample = True


@pytest.mark.parametrize("term", [Sinkhorn(), RKD()])
def test_they_have_no_value_for_each_image(term: Term) -> None:
    with pytest.raises(SettingsError, match="one value for the whole batch"):
        distiller({"it": term}, weighting=PerImage())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionTransfer((0,), (0, 1)), "in pairs"),
        (lambda: AttentionTransfer((), ()), "in pairs"),
        (lambda: BalancedDivergence(delta=0.0), "delta"),
        (lambda: PLD(0.0), "temperature"),
        (lambda: Sinkhorn(epsilon=0.0), "epsilon"),
    ],
)
def test_bad_settings_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_labels_that_are_missing_are_refused_or_left_out() -> None:
    method = distiller({"bd": BalancedDivergence()}, labelled=6)
    batch = prepared(method)
    terms, _ = method.student_loss(batch)
    has = batch["train"]["label"] >= 0
    logits = method.players["student"](batch["train"]["image"]).logits
    rows = balanced_divergence_loss(
        logits, batch["teacher"]["logits"], batch["train"]["label"].clamp(min=0), reduction="none"
    )
    torch.testing.assert_close(terms["bd"], (rows * has).sum() / len(rows) / 0.5)
