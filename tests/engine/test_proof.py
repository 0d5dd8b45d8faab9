"""Proof of learning: silent failures end a run, delayed starts do not, and watching changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Job, assert_same, override, play, train_stages
from miniatures import MINIATURES, Stages

from visiondistill.engine import Batch, Carry, Draw, Method, Result, Run, Stage, Terms, train

Loss = Callable[[Method, Batch], tuple[Terms, Carry]]


def hint_with(change: Callable[[Method, Batch, Terms], Terms], steps: int = 20) -> Stages:
    """The miniature with a feature hint, its terms changed."""
    stages, settings = MINIATURES["hint"](0, steps)
    kind = type(stages[0].method)

    def loss(self: Method, batch: Batch) -> tuple[Terms, Carry]:
        terms, carry = kind.loss(self, batch)
        return change(self, batch, terms), carry

    override(stages[0].method, loss=loss)
    return stages, settings


def trained(stages: list[Stage], settings: dict, folder: Path) -> Result:
    return train(stages, Run(**settings, output_dir=str(folder), progress=False, device="cpu"))


def test_a_term_that_never_reaches_its_player_ends_the_run(tmp_path: Path) -> None:
    stages, settings = hint_with(lambda _, __, terms: terms | {"teacher/kl": terms["teacher/kl"].detach()})
    error = train_stages(stages, settings, tmp_path).error
    assert error.startswith("NotLearning: ")
    assert "student/teacher/kl" in error
    assert "label/ce" not in error


def test_a_constant_term_ends_the_run(tmp_path: Path) -> None:
    stages, settings = hint_with(lambda _, __, terms: terms | {"extra": terms["label/ce"].new_tensor(0.3)})
    assert "student/extra" in train_stages(stages, settings, tmp_path).error


def test_a_player_without_any_gradient_is_named_at_once(tmp_path: Path) -> None:
    stages, settings = hint_with(lambda _, __, terms: {"label/ce": terms["label/ce"]})
    outcome = train_stages(stages, settings, tmp_path)
    assert outcome.error.startswith("NoGradient: ")
    assert "turn 'student'" in outcome.error
    assert "player 'projector'" in outcome.error
    assert not outcome.history


def test_a_mover_whose_rate_is_zero_ends_the_run(tmp_path: Path) -> None:
    stages, settings = MINIATURES["dmd2"](0, 100)
    still = dict(stages[0].optim.items())
    still["head"] = type(still["default"])(lr=0.0)
    error = train_stages([Stage(stages[0].method, 100, still)], settings, tmp_path).error
    assert error.startswith("NotLearning: ")
    assert "'head'" in error
    assert "'fake'" not in error


def test_a_frozen_network_that_moves_ends_the_run(tmp_path: Path) -> None:
    stages, settings = MINIATURES["hint"](0, 20)
    kind = type(stages[0].method)

    def prepare(self: Method, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        self.frozen["teacher"].head.bias.add_(1e-9)
        return kind.prepare(self, batch, draw, due)

    override(stages[0].method, prepare=prepare)
    error = train_stages(stages, settings, tmp_path).error
    assert error.startswith("NotLearning: ")
    assert "teacher" in error


def test_a_term_that_has_not_begun_is_waiting(tmp_path: Path) -> None:
    stages, settings = hint_with(lambda _, batch, terms: terms | {"teacher/hint": terms["teacher/hint"] * 0.0})
    report = trained(stages, settings, tmp_path).proofs["main"]
    assert report.waiting == ["student/teacher/hint"]
    assert report.reached["student/label/ce"] == ["student"]


def test_reach_is_told_by_term_and_player(tmp_path: Path) -> None:
    report = trained(*MINIATURES["hint"](0, 20), tmp_path).proofs["main"]
    assert report.reached == {
        "student/label/ce": ["student"],
        "student/teacher/kl": ["student"],
        "student/teacher/hint": ["student", "projector"],
    }
    assert not report.waiting


def test_no_alarm_where_teacher_and_student_begin_alike(tmp_path: Path) -> None:
    """DMD's first gradients are zero by design."""
    stages, settings = MINIATURES["dmd2"](0, 100)
    method = stages[0].method
    for player in ("generator", "fake"):
        method.players[player].load_state_dict(method.frozen["real"].state_dict())
    report = trained(stages, settings, tmp_path).proofs["main"]
    assert report.reached["student/dmd"] == ["generator"]


def test_a_turn_that_always_declines_is_told(tmp_path: Path) -> None:
    stages, settings = MINIATURES["adversarial"](0, 20, limit=-1.0)
    result = trained(stages, settings, tmp_path)
    assert result.proofs["main"].declined == ["augmentor"]
    fresh = MINIATURES["adversarial"](0, 20)[0][0].method
    assert_same(dict(result.method.players["augmentor"].state_dict()), dict(fresh.players["augmentor"].state_dict()))


@pytest.mark.parametrize("name", MINIATURES)
def test_watching_changes_no_bit(name: str, tmp_path: Path) -> None:
    watched = play(Job("watched", name), tmp_path)
    alone = play(Job("alone", name, settings={"proof_window": 0}), tmp_path)
    assert not watched.error
    assert_same(watched.weights, alone.weights)
    assert_same(watched.ema, alone.ema)
    assert watched.curve == alone.curve


def test_a_term_that_reaches_others_than_the_product_is_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(*MINIATURES["mutual"](0, 20), tmp_path)
    assert any("both/right/ce" in str(warning.message) for warning in caught)
    assert not any("both/left" in str(warning.message) for warning in caught)
