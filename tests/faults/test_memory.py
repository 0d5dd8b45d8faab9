"""No memory left: the run says which settings take less, and goes on later from a whole checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, assert_same, override, play, train_stages
from miniatures import MINIATURES
from torch import Tensor

from visiondistill import recipes
from visiondistill.cli import main
from visiondistill.engine import Method, Optim, Run, Stage, state
from visiondistill.engine import trial as engine_trial
from visiondistill.engine.errors import OutOfMemory
from visiondistill.engine.memory import advice, failed_allocation, memory_advice
from visiondistill.terms import CE, View

ON_THE_HOST = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
FAILURES: dict[str, Exception] = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    "host": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1099511627776 bytes."),
    "host, elsewhere": RuntimeError(f"{ON_THE_HOST} allocate 8000000000000 bytes. Error code 12"),
    "library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "Python": MemoryError(),
}


class Greedy(CE):
    """Cross-entropy that finds no memory once `fails_at` is reached, counted in calls of this process."""

    fails_at: int | None = None
    error: Exception = FAILURES["device"]
    calls = 0

    def forward(self, view: View) -> Tensor:
        type(self).calls += 1
        if Greedy.calls == Greedy.fails_at:
            raise Greedy.error
        return super().forward(view)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"fails_at": None, "error": FAILURES["device"], "calls": 0}.items():
        monkeypatch.setattr(Greedy, name, value)


def recipe(folder: Path, steps: int = 12, **settings: Any) -> dict[str, Any]:
    run = {"output_dir": str(folder), "batch_size": 16, "device": "cpu", "progress": False, "ema_decay": 0.9}
    streams = {"train": {"class_path": "visiondistill.data.Stream"}}
    digits = {"class_path": "visiondistill.data.Digits", "init_args": {"split": "train"}}
    streams["train"]["init_args"] = {"data": digits, "batch_size": 16}
    arguments = {
        "student": {"class_path": "visiondistill.models.SmallMLP", "init_args": {"in_features": 64, "hidden": [8]}},
        "terms": {"ce": {"class_path": "test_memory.Greedy"}},
        "streams": streams,
    }
    return {
        "method": {"class_path": "visiondistill.Distiller", "init_args": arguments},
        "steps": steps,
        "optim": {"student": {"name": "adamw", "lr": 1e-2}},
        "run": run | {"log_every": 5, "checkpoint_every": 5} | settings,
    }


def train(config: dict[str, Any], folder: Path) -> int:
    file = folder / "recipe.yaml"
    file.write_text(recipes.dump(config))
    return main(["train", "--recipe", str(file)])


@pytest.mark.parametrize("kind", FAILURES)
def test_the_command_ends_with_4_and_names_settings_with_their_values(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Greedy, "error", FAILURES[kind])
    monkeypatch.setattr(Greedy, "fails_at", 8)
    assert train(recipe(tmp_path / "run"), tmp_path) == 4
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert next(iter(str(FAILURES[kind]).splitlines()), "MemoryError") in said
    for line in (
        "run.grad_accum_steps=1: 2 holds 8 images at a time in place of 16",
        "run.mixed_precision=no: bf16",
        "run.compile=false: true",
        "run.ema_decay=0.9: null",
        "run.batch_size=16: a smaller one",
        "optim.*.name=adamw: momentum",
    ):
        assert f"  - {line}" in said, said
    assert f"The last checkpoint is whole: {tmp_path / 'run' / 'checkpoints' / 'step_000000005'}" in said


def test_before_the_first_checkpoint_none_is_promised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Greedy, "fails_at", 2)
    assert train(recipe(tmp_path / "run"), tmp_path) == 4
    assert "No checkpoint had been written yet" in capsys.readouterr().err


def test_the_run_goes_on_with_the_advice_that_keeps_its_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(recipe(tmp_path / "whole"), tmp_path) == 0
    monkeypatch.setattr(Greedy, "calls", 0)
    monkeypatch.setattr(Greedy, "fails_at", 8)
    assert train(recipe(tmp_path / "run"), tmp_path) == 4
    more = re.search(r"run\.grad_accum_steps=1: (\d+)", capsys.readouterr().err)[1]
    state.verify(tmp_path / "run" / "checkpoints" / "step_000000005")
    with pytest.warns(UserWarning, match="equal within rounding"):
        assert train(recipe(tmp_path / "run", resume="auto", grad_accum_steps=int(more)), tmp_path) == 0
    ends = [state.load(tmp_path / name / "checkpoints" / "step_000000012")[0]["weights"] for name in ("whole", "run")]
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-4)


def test_and_with_more_memory_to_the_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also out of the second turn of a step, of which the first had happened."""
    settings = {"checkpoint_every": 4}
    whole = play(Job("whole", "dmd2", steps=12, settings=settings), tmp_path)
    stages, own = MINIATURES["dmd2"](0, 12)
    kind, critic = type(stages[0].method), []

    def critic_loss(self: Method, batch: dict) -> tuple[dict, dict]:
        critic.append(1)
        if len(critic) == 6:
            raise FAILURES["device"]
        return kind.critic_loss(self, batch)

    override(stages[0].method, critic_loss=critic_loss)
    failed = train_stages(stages, own | settings, tmp_path / "run")
    assert failed.error.startswith("OutOfMemory: out of memory: CUDA out of memory")
    again = play(Job("run", "dmd2", weights=7, steps=12, settings=settings | {"resume": "auto"}), tmp_path)
    assert not again.error
    assert_same(again.weights, whole.weights)
    assert_same(again.ema, whole.ema)


def test_looking_and_trying_are_told_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from visiondistill.engine import train as engine_train

    def look(product: torch.nn.Module, step: int) -> dict[str, float]:
        raise FAILURES["device"]

    stages, settings = MINIATURES["hint"](0, 4)
    run = Run(str(tmp_path / "run"), **settings, device="cpu", progress=False, evaluate_every=2)
    with pytest.raises(OutOfMemory, match=r"run\.batch_size=8"):
        engine_train(stages, run, watch=look)

    monkeypatch.setattr(engine_trial, "_measured", lambda *arguments: look(None, 0))
    with pytest.raises(OutOfMemory, match=r"run\.batch_size=8"):
        engine_trial.fastest(stages[0], run, 4)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x"), OSError("disk")):
        with pytest.raises(type(error)) as caught, memory_advice(Run(str(tmp_path), batch_size=2), []):
            raise error
        assert caught.value is error
        assert not failed_allocation(error)


def test_only_what_can_take_less_is_named() -> None:
    spare = {"batch_size": 8, "grad_accum_steps": 8, "mixed_precision": "bf16", "compile": True}
    lines = advice(Run("x", **spare), [Stage(Method({}), 1, {"default": Optim("momentum")})])
    assert [line.partition(":")[0] for line in lines] == ["run.batch_size=8", "the images' size", "the networks"]


@pytest.mark.parametrize(("batch", "parts", "block", "told"), [(24, 1, None, 3), (6, 1, None, 3), (8, 2, 4, None)])
def test_micro_batches_are_cut_where_their_noise_may_be(batch: int, parts: int, block: int | None, told: int) -> None:
    """A run that goes on keeps the blocks of its noise; see `Draw`."""
    run = Run("x", batch_size=batch, grad_accum_steps=parts, noise_block=block)
    found = re.match(r"run\.grad_accum_steps=\d+: (\d+) holds", advice(run, [])[0])
    assert (found and int(found[1])) == told


@pytest.mark.gpu
def test_a_gpu_that_is_full(tmp_path: Path) -> None:
    """The real thing: a batch that no device holds."""
    stages, settings = MINIATURES["hint"](0, 4)
    kind = type(stages[0].method)

    def loss(self: Method, batch: dict) -> tuple[dict, dict]:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return kind.loss(self, batch)

    override(stages[0].method, loss=loss)
    outcome = train_stages(stages, settings | {"device": "cuda"}, tmp_path)
    assert outcome.error.startswith("OutOfMemory: ")
    torch.zeros(8, device="cuda").sum().item()
