"""The measurement of what two losses do to each other on one classifier and on two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from visiondistill import recipes
from visiondistill.data import OwnData, Source, TensorData
from visiondistill.losses import binary_kl_norm_loss
from visiondistill.mechanisms import dhkd
from visiondistill.teachers import store_targets

CLASSES, COUNT = 4, 96


class Mean(nn.Module):
    """Knows the classes of `set_of`."""

    num_classes = CLASSES

    def forward(self, x: Tensor) -> Tensor:
        return -20 * (x.mean((1, 2, 3))[:, None] - torch.arange(CLASSES) / CLASSES).abs()


@pytest.fixture
def source() -> Source:
    label = torch.arange(COUNT) % CLASSES
    noise = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 10
    image = noise + label.view(-1, 1, 1, 1) / CLASSES
    return OwnData(TensorData({"image": image, "label": label}), val_fraction=0)


@pytest.fixture
def teacher(source: Source, tmp_path: Path) -> str:
    store_targets(Mean(), source, tmp_path / "teacher.safetensors")
    return str(tmp_path / "teacher.safetensors")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    load = recipes.load
    changes = {"steps": 6, "student.widths": [4, 8], "run.batch_size": 16, "run.evaluate_every": 2}
    monkeypatch.setattr(recipes, "load", lambda name: recipes.override(load(name), changes | {"run.proof_window": 2}))
    monkeypatch.setattr(dhkd, "PART", 8)


def test_the_arms_are_what_they_are_called() -> None:
    arms = {arm: recipes.load(f"measured/dhkd_{arm}")["method"]["init_args"] for arm in dhkd.ARMS}
    assert {arm: set(own["terms"]) for arm, own in arms.items()} == {
        "ce": {"ce"},
        "kd": {"ce", "kd"},
        "logits": {"logits"},
        **{arm: {"ce", "logits"} for arm in ("both", "both_light", "dual", "aligned")},
    }
    assert [arm for arm, own in arms.items() if "heads" in own] == ["dual", "aligned"]
    assert [arm for arm, own in arms.items() if own["terms"].get("logits", {}).get("init_args", {}).get("head")] == [
        "dual",
        "aligned",
    ]
    assert arms["aligned"]["weighting"] == {"class_path": "visiondistill.weighting.Aligned"}
    assert [arm for arm in ("both", "dual") if "weighting" in arms[arm]] == []
    assert arms["both_light"]["weighting"]["init_args"] == {"weights": {"logits": 0.1}}
    assert arms["both_light"]["terms"] == arms["both"]["terms"]


def test_the_cosine_is_that_of_the_two_gradients(source: Source, teacher: str, tmp_path: Path) -> None:
    """Against the losses by hand, of a plain student on one classifier; looking changes nothing."""
    config = recipes.load("measured/dhkd_both")
    method = recipes.plan(recipes.override(config, {"teacher.file": teacher}), source=source).stages[0].method
    batch = source.train().rows(torch.arange(8))
    logits = method.parts["teacher"].targets(batch)["logits"]
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    found = dhkd.gradients(method, {"train": batch, "teacher": {"logits": logits}})
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    student = method.players["student"].train()
    trunk = list(student.model.stages.parameters())
    own = student(batch["image"]).logits
    losses = (cross_entropy(own, batch["label"]), binary_kl_norm_loss(own, logits, 2.0))
    for gradient, loss in zip(found, losses, strict=True):
        by_hand = torch.autograd.grad(loss, trunk, retain_graph=True)
        torch.testing.assert_close(gradient, torch.cat([each.flatten() for each in by_hand]))
    assert -1 <= dhkd.cosine(method) <= 1
    assert cosine_similarity(*found, dim=0) != 0


def test_it_measures_each_run_once_in_any_process(
    source: Source, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(recipes, "source_of", lambda config: source)
    own = ["dhkd", "--data", "none", "--teacher", teacher, "--output", str(tmp_path)]

    def call(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [*own, *words])
        dhkd.main()
        return capsys.readouterr().out.splitlines()

    for arm in dhkd.ARMS:
        (line,) = call("--arms", arm, "--only-seed", "0")
        assert line.startswith(f"{arm}, seed 0: ")
        found = json.loads((tmp_path / f"{arm}_0" / "result.json").read_text())
        assert ("cosine" in found) == (arm in ("both", "both_light", "dual", "aligned"))
    assert call("--arms", "dual", "--only-seed", "0") == []
    assert list(dhkd.cosines(tmp_path / "dual_0")) == [2, 4, 6]
    for arm, reached in {"both": 0.25, "dual": 0.5}.items():
        for seed in (0, 1):
            (tmp_path / f"{arm}_{seed}").mkdir(exist_ok=True)
            told = {"accuracy": reached + seed * (0.01 if arm == "dual" else 0), "cosine": -0.5, "seconds": 1.0}
            (tmp_path / f"{arm}_{seed}" / "result.json").write_text(json.dumps(told))
            if seed:
                (tmp_path / f"{arm}_1" / "metrics.jsonl").write_text('{"step": 2, "trunk/cosine": -0.5}\n')
    rows = call("--arms", "both", "dual", "--seeds", "2")
    assert "| both | 25.00 ± 0.00 |  | -0.500 ± 0.000 | 2 |" in rows
    # 25 and 26 points ahead: 12.71 standard errors of one half are the interval.
    assert "| dual | 50.50 ± 0.71 | +25.50 ± 6.35 | -0.500 ± 0.000 | 2 |" in rows
    assert (tmp_path / "dhkd.png").stat().st_size > 5000
