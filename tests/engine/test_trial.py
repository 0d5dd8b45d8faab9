"""`performance: auto`: what is kept, and that trying leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import assert_same, state, train_stages
from miniatures import MINIATURES

from visiondistill.engine import Method, Run, trial
from visiondistill.engine.settings import Stage
from visiondistill.engine.trial import Cost, fastest


def a_run(folder: Path, **settings: object) -> Run:
    return Run(**{"output_dir": str(folder), "batch_size": 16, "device": "cpu", "progress": False} | settings)


def first_stage(name: str) -> tuple[Stage, dict]:
    stages, settings = MINIATURES[name](0, 20)
    method = stages[0].method if isinstance(stages[0].method, Method) else stages[0].method(None)
    return replace(stages[0], method=method), settings


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[tuple, Cost | Exception]:
    """Pretended costs by (channels_last, mixed_precision, compile)."""
    pretended: dict[tuple, Cost | Exception] = {}

    def measured(stage: Stage, method: Method, run: Run, world: object) -> Cost:
        cost = pretended[run.channels_last, run.mixed_precision, run.compile]
        if isinstance(cost, Exception):
            raise cost
        return cost

    monkeypatch.setattr(trial, "_measured", measured)
    return pretended


def picked(run: Run) -> tuple:
    return run.channels_last, run.mixed_precision, run.compile


def test_each_switch_is_tried_on_what_was_kept_before(costs: dict, tmp_path: Path) -> None:
    costs[False, "no", False] = Cost(0, 1.0)
    costs[True, "no", False] = Cost(0, 0.97)  # too small a gain to be told from noise
    costs[False, "bf16", False] = Cost(0, 0.6)
    costs[False, "bf16", True] = Cost(30, 0.3)
    stage, _ = first_stage("hint")
    long, lines = fastest(stage, a_run(tmp_path), 1000)
    assert picked(long) == (False, "bf16", True)
    assert ["kept" in line for line in lines] == [False, False, True, True]
    # 100 steps would gain 30 s and cost 30 s.
    short, _ = fastest(stage, a_run(tmp_path), 100)
    assert picked(short) == (False, "bf16", False)


def test_what_is_on_stays_on_and_what_fails_stays_off(costs: dict, tmp_path: Path) -> None:
    costs[True, "no", False] = Cost(0, 1.0)
    costs[True, "bf16", False] = RuntimeError("no such kernel\nlong story")
    costs[True, "no", True] = Cost(0, 0.1)
    stage, _ = first_stage("hint")
    run, lines = fastest(stage, a_run(tmp_path, channels_last=True), 100)
    assert picked(run) == (True, "no", True)
    assert len(lines) == 3
    assert "not possible here (no such kernel)" in lines[1]


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_trying_leaves_no_trace(name: str, tmp_path: Path) -> None:
    stage, settings = first_stage(name)
    before, generator = state(stage.method), torch.get_rng_state()
    modes = [part.training for part in stage.method.modules()]
    run = a_run(tmp_path / "run", compile_backend="eager", **settings)
    _, lines = fastest(stage, run, 20)
    # float64 networks cannot run under autocast, and a method may say that it cannot compile.
    assert len(lines) == 4
    assert_same(state(stage.method), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [part.training for part in stage.method.modules()] == modes
    assert all(p.grad is None for p in stage.method.parameters())
    assert not (tmp_path / "run").exists()


def test_a_run_after_the_trial_is_the_run_without_it(tmp_path: Path) -> None:
    stages, settings = MINIATURES["hint"](0, 10)
    alone = train_stages(stages, settings, tmp_path / "alone")
    stages, settings = MINIATURES["hint"](0, 10)
    fastest(stages[0], a_run(tmp_path, compile_backend="eager", **settings), 10)
    assert_same(train_stages(stages, settings, tmp_path / "tried").weights, alone.weights)


def test_a_continued_run_keeps_what_was_picked(costs: dict, tmp_path: Path) -> None:
    stages, settings = MINIATURES["hint"](0, 10)
    train_stages(stages, settings | {"channels_last": True}, tmp_path / "run")
    run = a_run(tmp_path / "run", resume="auto", **settings)
    again, lines = fastest(first_stage("hint")[0], run, 20)
    assert picked(again) == (True, "no", False)
    assert lines == ["as picked when the run began"]


def test_the_benchmark_tries_every_switch_on_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    from visiondistill.benchmark import benchmark_performance

    monkeypatch.setattr(trial, "SWITCHES", {"channels_last": True, "mixed_precision": "bf16"})
    lines = benchmark_performance("test_vit", "test_resnet", 32, 2)
    assert [line.partition(":")[0] for line in lines] == ["as set", "+ channels_last=True", "+ mixed_precision=bf16"]
    assert all("ms a step" in line for line in lines)
