"""The schedule of TAID: as released, once per update, saved with the run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from distilling import distiller, net, play, prepared

from visiondistill.losses import taid_loss
from visiondistill.teachers import Online
from visiondistill.terms import TAID, Peer


def followed(term: TAID, losses: list[float]) -> tuple[list[float], list[float]]:
    """The share and the momentum after each update."""
    shares, momenta = [], []
    for step, loss in enumerate(losses):
        line = term.start + (term.end - term.start) * step / term.steps
        for name, value in term.after("student", {"loss": torch.tensor(loss), "line": torch.tensor(line)}).items():
            getattr(term, name).copy_(value)
        shares.append(term.share.item())
        momenta.append(term.momentum.item())
    return shares, momenta


def test_the_schedule_equals_official_code(shared_dir) -> None:
    cases = torch.load(shared_dir / "reference_values" / "kd" / "taid.pt", weights_only=True)["cases"]
    compared = 0
    for case in cases:
        hyper = case["hyper"]
        if not case["name"].startswith("schedule"):
            continue
        # Without the adaptive part the released code leaves the straight line alone.
        alpha = 0.0 if hyper["disable_adaptive"] else hyper["alpha"]
        term = TAID(hyper["num_train_steps"], hyper["t_start"], hyper["t_end"], alpha, hyper["beta"])
        shares, momenta = followed(term, case["inputs"]["losses"].tolist())
        expected = case["outputs"]
        torch.testing.assert_close(torch.tensor(shares), expected["t_after_each_update"], rtol=1e-5, atol=1e-6)
        if not hyper["disable_adaptive"]:
            torch.testing.assert_close(
                torch.tensor(momenta), expected["momentum_after_each_update"], rtol=1e-5, atol=1e-6
            )
        compared += 1
    assert compared >= 2


def test_a_falling_loss_hurries_and_a_rising_one_does_not() -> None:
    settings = {"steps": 10_000, "start": 0.1, "alpha": 0.1, "beta": 0.5}
    falling, _ = followed(TAID(**settings), [2.0 * 0.5**n for n in range(20)])
    rising, _ = followed(TAID(**settings), [2.0 * 1.5**n for n in range(20)])
    assert falling[-1] > rising[-1] > 0.1
    assert all(a <= b for a, b in itertools.pairwise(falling)), "the share never goes back"


def test_the_share_ends_at_the_end() -> None:
    shares, _ = followed(TAID(steps=5, start=0.2, end=0.8), [1.0] * 9)
    assert shares[-1] == pytest.approx(0.8)
    assert max(shares) <= 0.8 + 1e-6


def test_the_term_reads_the_share_and_the_engine_moves_it(tmp_path: Path) -> None:
    method = distiller({"taid": TAID(steps=6)})
    batch = prepared(method)
    terms, carry = method.student_loss(batch)
    logits = method.players["student"](batch["train"]["image"]).logits
    torch.testing.assert_close(terms["taid"], taid_loss(logits, batch["teacher"]["logits"], 0.4))
    assert set(carry) == {"taid.loss", "taid.line"}
    play(method, tmp_path / "run", steps=6)
    # After the update of step 5: the line is 5/6 of the way.
    assert method.parts["taid"].share.item() == pytest.approx(0.9, abs=2e-3)


def test_micro_batches_are_one_update(tmp_path: Path) -> None:
    whole, split = distiller({"taid": TAID(steps=6)}), distiller({"taid": TAID(steps=6)})
    play(whole, tmp_path / "whole")
    play(split, tmp_path / "split", grad_accum_steps=2)
    for name in ("share", "momentum", "loss_before"):
        torch.testing.assert_close(getattr(split.parts["taid"], name), getattr(whole.parts["taid"], name))


def test_two_of_them_and_a_peer_keep_to_their_own_lines(tmp_path: Path) -> None:
    terms = {"slow": TAID(steps=60), "taid": TAID(steps=6), "theirs": Peer(TAID(steps=12, start=0.0))}
    method = distiller(terms, teacher=Online(net(6, 9, seed=5)))
    play(method, tmp_path / "run", steps=6)
    shares = {"slow": 0.45, "taid": 0.9, "theirs": 5 / 12}
    for name, term in {**method.parts, "theirs": method.parts["theirs"].term}.items():
        if name in shares:
            assert term.share.item() == pytest.approx(shares[name], abs=4e-3)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 5, "start": 0.9, "end": 0.5}, {"steps": 5, "end": 1.5}])
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="start <= end"):
        TAID(**settings)
