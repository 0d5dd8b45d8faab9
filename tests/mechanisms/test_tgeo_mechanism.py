"""The measurement of what trilateral weights make of a teacher that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from visiondistill import recipes
from visiondistill.data import Glyphs
from visiondistill.mechanisms import tgeo
from visiondistill.mechanisms.pair import Pair, configured
from visiondistill.models import Network, SmallConvNet

COUNT = 60


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    network = Network(SmallConvNet([4, 8], "batch"), input_size=(1, 20, 20))
    return Pair(Glyphs(COUNT, 20, 40), network.eval())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(arm: str, changes: dict[str, Any]) -> recipes.Config:
        tiny = {"steps": 4, "run.batch_size": 20, "run.log_every": 2, "run.proof_window": 0}
        tiny |= {"student.in_channels": 1, "student.widths": [4, 8]}
        return recipes.override(configured(arm, changes), tiny)

    monkeypatch.setattr(tgeo, "configured", few)


def test_a_fifth_of_the_images_is_answered_as_surely_and_wrongly(pair: Pair) -> None:
    teacher, data = tgeo.Corrupted(pair.teacher, COUNT), pair.source.train()
    rows = torch.arange(COUNT).flip(0)
    batch = data.rows(rows)
    with torch.no_grad():
        plain, found = pair.teacher(batch["image"]).logits, teacher.targets(batch)["logits"]
    hit = (plain != found).any(1)
    assert torch.equal(hit, teacher.rotation[rows] > 0), "the image's number decides, not its place in the batch"
    assert hit.sum() == round(tgeo.CORRUPTED * COUNT)
    assert torch.equal(plain.sort(1).values, found.sort(1).values)
    assert not (plain.argmax(1) == found.argmax(1))[hit].any()
    assert torch.equal(found.argmax(1), (plain.argmax(1) + teacher.rotation[rows]) % 10)
    assert torch.equal(tgeo.Corrupted(pair.teacher, COUNT).rotation, teacher.rotation)


def test_alphas_are_of_their_own_group(pair: Pair, short: None) -> None:
    teacher = tgeo.Corrupted(pair.teacher, COUNT)
    config = tgeo.configured(*tgeo.changes("tgeo"))
    given = {"data": pair.source, "teacher": teacher}
    method = recipes.plan({k: v for k, v in config.items() if k not in given}, given).stages[0].method
    weighting = method.parts["weighting"]
    weighting.shares = lambda view: view.batch["train"]["index"].float() / COUNT
    batch = pair.source.train().rows(torch.arange(COUNT))
    with torch.no_grad():
        answer = pair.teacher(batch["image"]).logits.argmax(1)
    right, bad = answer == batch["label"], teacher.rotation > 0
    # An image whose wrong answer the rotation puts right is corrupted all the same.
    lucky = (bad & ~right).nonzero()[0]
    teacher.rotation[lucky] = (batch["label"] - answer)[lucky] % 10
    assert (right & ~bad).any()
    method.train()
    found = tgeo.alphas(method, pair.source.train())
    for name, rows in {"corrupted": bad, "right": ~bad & right, "wrong": ~bad & ~right}.items():
        assert torch.equal((found[name] * COUNT).round().long(), rows.nonzero()[:, 0]), name
    assert method.players["student"].training, "looking changes nothing"


def test_it_measures_each_run_once(pair: Pair, short: None, tmp_path: Path) -> None:
    arms = ["alpha_0.0", "alpha_0.7", "tgeo", "tgeo_no_means"]
    for arm in arms:
        found = tgeo.measured(arm, 0, pair, tmp_path)
        assert 0 <= found["accuracy"] <= 1
        assert ("clean" in found) == arm.startswith("tgeo")
    kept = torch.load(tmp_path / "tgeo_0" / "alpha.pt", weights_only=True)
    assert sum(map(len, kept.values())) == COUNT
    assert kept["corrupted"].mean().item() == pytest.approx(
        json.loads((tmp_path / "tgeo_0" / "result.json").read_text())["corrupted"]
    )
    (tmp_path / "alpha_0.7_0" / "result.json").write_text('{"accuracy": 0.875}')
    assert tgeo.measured("alpha_0.7", 0, pair, tmp_path) == {"accuracy": 0.875}
    tgeo.draw(tmp_path, arms, range(3))
    assert (tmp_path / "alpha.png").stat().st_size > 5000
    assert len(tgeo.table(tmp_path, arms, range(3)).splitlines()) == 2 + len(arms)


def test_the_table_holds_against_the_best_fixed_share(tmp_path: Path) -> None:
    alphas = {"corrupted": 0.4, "clean": 0.5, "right": 0.55, "wrong": 0.25}
    accuracies = {"alpha_0.3": (0.5, 0.6), "alpha_0.5": (0.6, 0.6), "tgeo": (0.5, 0.5)}
    for arm, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            (tmp_path / f"{arm}_{seed}").mkdir()
            told = {"accuracy": accuracy} | (alphas if arm == "tgeo" else {})
            (tmp_path / f"{arm}_{seed}" / "result.json").write_text(json.dumps(told))
    header, _, _, best, last = tgeo.table(tmp_path, [*accuracies, "alpha_0.9"], range(3)).splitlines()
    assert "minus alpha_0.5" in header
    assert best == "| alpha_0.5 | 60.00 ± 0.00 |  | - | - | - | - | - |"
    assert last == (
        "| tgeo | 50.00 ± 0.00 | -10.00 ± 0.00 | 0.400 ± 0.000 | 0.550 ± 0.000 | 0.250 ± 0.000 "
        "| -0.100 ± 0.000 | -0.300 ± 0.000 |"
    )


@pytest.mark.parametrize("arm", tgeo.ARMS)
def test_arms_are_of_the_comparison(arm: str) -> None:
    config = configured(*tgeo.changes(arm))
    recipes.check(config)
    weighting = config["method"]["init_args"]["weighting"]["init_args"]
    if arm in tgeo.FIXED:
        assert sum(weighting["weights"].values()) == pytest.approx(1)
    else:
        assert "weighting_net" in config["optim"]
