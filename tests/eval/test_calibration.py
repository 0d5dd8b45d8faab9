"""Temperature scaling finds the temperature; the diagram's table is the calibration error's."""

from __future__ import annotations

import pytest
import torch
from test_classify import random_answers

from visiondistill.eval import Answers, fit_temperature, reliability


def drawn_from_itself(temperature: float, rows: int = 20_000) -> Answers:
    """Labels drawn from softmax(logits / temperature): that temperature is the right one."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, 10, generator=generator, dtype=torch.float64)
    label = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    return Answers(logits, label)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    answers = drawn_from_itself(temperature)
    found = fit_temperature(answers)
    assert found == pytest.approx(temperature, rel=0.04)
    assert answers.scores(found).ece < 0.012
    assert answers.scores(found).accuracy == answers.scores().accuracy


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_no_other_temperature_is_likelier(scale):
    answers = random_answers(scale=1.0)
    answers = Answers(answers.logits * scale, answers.label)
    found = fit_temperature(answers)
    best = answers.scores(found).nll
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        other = found * factor
        if 0.05 <= other <= 20:
            assert best <= answers.scores(other).nll


def test_temperature_scales_with_the_logits():
    answers = random_answers()
    tenfold = Answers(10 * answers.logits, answers.label)
    assert fit_temperature(tenfold) == pytest.approx(10 * fit_temperature(answers), rel=1e-6)


def test_where_there_is_no_best_temperature_it_stays_within_its_bounds():
    logits = 5 * torch.eye(4)
    all_right = Answers(logits, torch.arange(4))
    found = fit_temperature(all_right)
    assert 0.05 <= found < 1
    assert all_right.scores(found).nll < 1e-12
    assert fit_temperature(Answers(-logits, torch.arange(4))) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_table_adds_up_to_the_calibration_error(temperature):
    answers = random_answers()
    bins = reliability(answers.judge(temperature))
    scores = answers.scores(temperature)
    gap = (bins.accuracy - bins.confidence).abs().nan_to_num()
    assert (gap * bins.count).sum().item() / scores.count == pytest.approx(scores.ece, abs=1e-12)
    assert bins.count.sum() == scores.count
    assert (bins.accuracy.nan_to_num() * bins.count).sum().item() == pytest.approx(scores.correct)
    held = bins.count > 0
    edges = torch.arange(15) / 15
    assert torch.all((bins.confidence > edges)[held] & (bins.confidence <= edges + 1 / 15 + 1e-12)[held])
    assert bins.accuracy[~held].isnan().all()
