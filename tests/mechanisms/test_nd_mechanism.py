"""The measurement of lengths and directions of features."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from visiondistill import recipes
from visiondistill.data import Glyphs
from visiondistill.mechanisms import nd
from visiondistill.mechanisms.pair import Pair, configured
from visiondistill.models import Network, SmallConvNet

WIDTHS = [4, 4, 8, 16]


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    network = Network(SmallConvNet(WIDTHS, "batch"), input_size=(1, 20, 20))
    return Pair(Glyphs(60, 20, 40), network.eval())


def test_lengths_are_over_the_teachers_and_directions_to_the_label(pair: Pair) -> None:
    means, test = nd.teacher_means(pair.teacher, pair.source), pair.source.test()
    longer = copy.deepcopy(pair.teacher)
    with torch.no_grad():
        longer.model.stages[-1][1].weight.mul_(3)
        longer.model.stages[-1][1].bias.mul_(3)
    own, found = (nd.directions(net, pair.teacher, means, test) for net in (pair.teacher, longer))
    torch.testing.assert_close(own["length"], torch.ones(40))
    torch.testing.assert_close(found["length"], torch.full((40,), 3.0))
    torch.testing.assert_close(found["cosine"], own["cosine"])
    data, other = pair.source.train().columns, Network(SmallConvNet(WIDTHS, "batch"), input_size=(1, 20, 20)).eval()
    with torch.no_grad():
        features = pair.teacher(data["image"], embedding=True).embedding
        ours = other(test.columns["image"], embedding=True).embedding
    towards = torch.stack([features[data["label"] == k].mean(0) for k in range(10)])
    torch.testing.assert_close(means, towards)
    towards = towards[test.columns["label"]]
    cosine = (ours * towards).sum(1) / (ours.norm(dim=1) * towards.norm(dim=1))
    torch.testing.assert_close(nd.directions(other, pair.teacher, means, test)["cosine"], cosine)


@pytest.mark.parametrize("base", nd.BASES)
def test_the_term_is_all_that_differs(base: str) -> None:
    plain, ours = (configured(*nd.changes(arm)) for arm in (base, base + nd.WITH))
    recipes.check(plain)
    recipes.check(ours)
    init = ours["method"]["init_args"]
    assert init["terms"].pop("nd")["class_path"] == "visiondistill.terms.NormDirection"
    assert init["weighting"]["init_args"]["weights"].pop("nd") == nd.WEIGHT
    assert ours == plain
    assert init["weighting"]["init_args"]["weights"].keys() == init["terms"].keys(), "every term has its weight"


def test_it_measures_each_run_once(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(arm: str, changes: dict[str, Any]) -> recipes.Config:
        tiny = {"steps": 4, "run.batch_size": 20, "run.log_every": 2, "run.proof_window": 0}
        tiny |= {"student.in_channels": 1, "student.widths": WIDTHS}
        return recipes.override(configured(arm, changes), tiny)

    monkeypatch.setattr(nd, "configured", few)
    means, arms = nd.teacher_means(pair.teacher, pair.source), [*nd.ARMS[:2], *nd.ARMS[-2:]]
    for arm in arms:
        found = nd.measured(arm, 0, pair, means, tmp_path)
        assert found.keys() == {"accuracy", "length", "cosine"}
        kept = torch.load(tmp_path / f"{arm}_0" / "features.pt", weights_only=True)
        assert {name: values.mean().item() for name, values in kept.items()}.items() <= found.items()
    (tmp_path / "kd_0" / "result.json").write_text('{"accuracy": 0.25, "length": 0.5, "cosine": 0.75}')
    assert nd.measured("kd", 0, pair, means, tmp_path)["length"] == 0.5
    (tmp_path / "kd+nd_0" / "result.json").write_text('{"accuracy": 0.2, "length": 0.9, "cosine": 0.8}')
    lines = nd.table(tmp_path, arms, range(2)).splitlines()
    assert lines[2] == "| kd | 25.00 |  | 0.500 |  | 0.750 |  |"
    assert lines[3] == "| kd+nd | 20.00 | -5.00 | 0.900 | +0.400 | 0.800 | +0.050 |"
    nd.draw(tmp_path, arms, range(2), nd.directions(pair.teacher, pair.teacher, means, pair.source.test()))
    assert (tmp_path / "features.png").stat().st_size > 10000
