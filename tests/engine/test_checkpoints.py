"""Checkpoints: whole or not at all, verified, kept long enough, refused where they are not this run."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from visiondistill.data import Stream, TensorData
from visiondistill.engine import Draw, Method, Optim, Run, Stage, Turn, state, train
from visiondistill.engine import signals as signals_module
from visiondistill.engine.errors import ResumeError, SettingsError
from visiondistill.engine.launch import World
from visiondistill.engine.signals import Signals


class Regression(Method):
    """A line through points, with hooks for the tests to act in the middle of a run."""

    def __init__(self, slope: float = 2.0, at: int | None = None, act=lambda: None) -> None:
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 64)[:, None]
        stream = Stream(TensorData({"x": x, "y": slope * x}), batch_size=16)
        super().__init__({"line": nn.Linear(1, 1)}, streams={"train": stream})
        self.slope, self._at, self._act = slope, at, act

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("fit", self.loss, moves=("line",)),)

    def prepare(self, batch: dict, draw: Draw, due: frozenset[str]) -> dict:
        if draw.step == self._at:
            self._act()
        return batch

    def loss(self, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        line = self.players["line"](batch["train"]["x"])
        return {"mse": (line - batch["train"]["y"]).square().mean()}, {}


def run(folder: Path, method: Method | None = None, steps: int = 12, lr: float = 1e-2, **settings):
    defaults = {"batch_size": 16, "checkpoint_every": 4, "log_every": 4, "progress": False, "device": "cpu"}
    stage = Stage(method or Regression(), steps, {"line": Optim(lr=lr)})
    return train([stage], Run(output_dir=str(folder), **defaults | settings))


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_failing_save_leaves_the_previous_checkpoint_and_no_remains(tmp_path: Path, monkeypatch) -> None:
    state.save(tmp_path / "step_1", {"weights": {"w": torch.ones(2)}}, {"step": 1})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "_flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "step_2", {"weights": {"w": torch.zeros(2)}}, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert state.load(tmp_path / "step_1")[0]["weights"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty"])
def test_damage_is_found_and_the_previous_checkpoint_used(tmp_path: Path, damage: str) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_000000012" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        content[-1] ^= 1
        cut = {"truncate": len(content) // 2, "flip": len(content), "empty": 0}[damage]
        file.write_bytes(bytes(content[:cut]))
    with pytest.warns(UserWarning, match=r"weights\.safetensors"):
        resumed = run(tmp_path / "run", resume="auto")
    assert torch.equal(resumed.product.weight, whole.product.weight)


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    run(tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "meta.json").unlink()
    with pytest.warns(UserWarning, match="falling back"), pytest.raises(ResumeError, match="no checkpoint"):
        run(tmp_path, resume="auto")


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    run(tmp_path, steps=20, checkpoint_every=2, keep=2, keep_every=8)
    assert saved(tmp_path) == [f"step_{step:09d}" for step in (8, 16, 18, 20)]


def test_a_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ResumeError, match="already holds a run"):
        run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_named_checkpoint_that_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for option in ({"resume": str(tmp_path / name)}, {"init_from": str(tmp_path / name)}):
        with pytest.raises(ResumeError, match=name):
            run(tmp_path / "new", **option)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "run.seed: was 0, is 1"),
        ({"lr": 0.5}, "stage.optim.line.lr"),
        ({"steps": 13}, "stage.steps"),
        ({"method": Regression(slope=3.0)}, "hyperparameters.method.slope"),
    ],
)
def test_another_run_cannot_be_resumed(tmp_path: Path, change: dict, named: str) -> None:
    run(tmp_path)
    with pytest.raises(ResumeError, match=named):
        run(tmp_path, resume="auto", **change)


def test_what_cannot_change_the_result_may_differ_on_resume(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "run", Regression(at=6, act=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resumed = run(tmp_path / "run", resume="auto", log_every=3, checkpoint_every=5, keep=1)
    assert resumed.reason == "finished"
    assert torch.equal(resumed.product.weight, whole.product.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_came_in(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    result = run(tmp_path, Regression(at=6, act=lambda: os.kill(os.getpid(), number)))
    assert (result.reason, result.step) == (signal.Signals(number).name, 7)
    assert "step_000000007" in saved(tmp_path)
    assert signal.getsignal(number) == before


def test_a_signal_is_answered_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Not when its step is over, which may take a while."""
    answers = []

    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        answers.append(capfd.readouterr().err)

    run(tmp_path, Regression(at=6, act=act))
    assert answers == ["\nSIGINT: finishes this step and saves; Ctrl-C interrupts at once from now on\n"]


def test_a_signal_is_answered_once_and_by_the_first_process_alone(capfd: pytest.CaptureFixture) -> None:
    for rank, size, told in ((0, 1, "this step"), (0, 2, "the steps up to the next metrics line"), (1, 2, "")):
        with Signals(World(torch.device("cpu"), rank, size)) as signals:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        said = capfd.readouterr().err
        assert said.count("SIGTERM") == (rank == 0)
        assert f"finishes {told} and saves" in said or not told


def test_a_signal_counts_where_stderr_has_gone_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_module, "STDERR", -1)
    with Signals(World(torch.device("cpu"))) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM


def test_a_run_that_may_go_on_says_where_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    last = first / "checkpoints" / "step_000000012"
    anew = f"starts anew: there is no checkpoint in {first}\n"
    for folder, resume, told in ((first, "auto", anew), (first, "auto", last), (other, str(first), last)):
        run(folder, resume=resume, progress=True)
        said = capsys.readouterr().err
        assert said.startswith(told if told == anew else f"goes on after step 12 ({told})\n")
    run(first, resume="auto")
    assert capsys.readouterr().err == ""
    run(tmp_path / "plain", progress=True)
    assert capsys.readouterr().err.startswith("step 4/12")


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].reason == "finished"


def test_init_from_takes_weights_and_nothing_else(tmp_path: Path) -> None:
    first = run(tmp_path / "first")
    second = run(tmp_path / "second", steps=1, lr=0.0, init_from=str(tmp_path / "first"))
    assert second.step == 1
    assert torch.equal(second.product.weight, first.product.weight)


def test_init_from_another_network_names_the_tensors(tmp_path: Path) -> None:
    run(tmp_path / "first")
    other = Regression()
    other.players["line"] = nn.Linear(1, 1, bias=False)
    with pytest.raises(ResumeError, match=r"unexpected 'players\.line\.bias'"):
        run(tmp_path / "second", other, init_from=str(tmp_path / "first"))


def test_a_resumed_run_has_one_metrics_line_per_window(tmp_path: Path) -> None:
    run(tmp_path, Regression(at=9, act=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    run(tmp_path, resume="auto")
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 10, 12]


def test_a_half_written_metrics_line_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, Regression(at=5, act=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "fit/m')
    run(tmp_path, resume="auto")
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"grad_accum_steps": 3}, "grad_accum_steps"),
        ({"mixed_precision": "half"}, "mixed_precision"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"noise_block": 3}, "noise_block"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_wrong_settings_name_the_culprit(tmp_path: Path, settings: dict, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        run(tmp_path, **settings)


def test_a_turn_that_is_never_due_is_refused(tmp_path: Path) -> None:
    class Late(Regression):
        def turns(self) -> tuple[Turn, ...]:
            return (Turn("fit", self.loss, moves=("line",), start=100),)

    with pytest.raises(SettingsError, match="never due"):
        run(tmp_path, Late())


def test_a_trainable_tensor_of_nobody_is_refused(tmp_path: Path) -> None:
    method = Regression()
    method.stray = nn.Linear(2, 2)
    with pytest.raises(SettingsError, match=r"stray\.weight"):
        run(tmp_path, method)


class Law:
    """A plain object that a method may be told."""

    def __init__(self, low: float) -> None:
        self.low = low


@pytest.mark.parametrize(
    ("told", "other"),
    [({"kd": 0.9}, {"kd": 0.8}), ((1, 2), (1, 3)), (Law(0.1), Law(0.2)), (Optim(lr=1.0), Optim(lr=2.0))],
)
def test_what_a_method_was_told_is_compared_on_resume(tmp_path: Path, told: object, other: object) -> None:
    first, second = Regression(), Regression()
    first.told, second.told = told, other
    run(tmp_path, first)
    with pytest.raises(ResumeError, match=r"hyperparameters\.method\.told"):
        run(tmp_path, second, resume="auto")


def test_shared_draws_take_any_shape() -> None:
    draw = Draw(0, 0, {"": (0, 4)}, 2, torch.device("cpu"))
    assert draw.shared.integers("exit", 0, 10).shape == ()
    assert draw.shared.normal("z", 2, 3).shape == (2, 3)
