"""One unit, the optimiser update that happened, for schedules, averages and logs; every image of an epoch once."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import override
from miniatures import BATCH, MINIATURES, ROWS, Table, adversarial, built
from torch import Tensor, nn

from visiondistill import recipes
from visiondistill.cli import main
from visiondistill.data import Digits, Stream, TensorData
from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Result, Run, Stage, Terms, Turn, track, train
from visiondistill.engine.errors import NotLearning, SettingsError
from visiondistill.engine.launch import World
from visiondistill.engine.players import Player
from visiondistill.engine.shares import Shares

LR, STEPS, WARMUP = 0.1, 12, 3


def settings_of(folder: Path, **more: Any) -> Run:
    own = {"batch_size": BATCH, "noise_block": 1, "progress": False, "device": "cpu", "log_every": 1, "proof_window": 0}
    return Run(str(folder), **own | more)


class Fit(Method):
    """A linear fit whose loss is multiplied by `factor`; declines at the steps in `declines`."""

    def __init__(self, declines: tuple[int, ...] = (), factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        line = built(0, lambda: nn.Linear(4, 1)).float()
        super().__init__({"line": line}, streams={"train": Table(x=torch.rand(ROWS, 4, generator=generator))})
        self.declines, self.factor = declines, factor
        self._weights: list[Tensor] = []

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("fit", self.loss, moves=("line",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        if len(self._weights) == draw.step:
            self._weights.append(self.players["line"].weight.detach().clone())
        return batch | {"declines": torch.tensor(1.0 if draw.step in self.declines else -1.0)}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        line = self.players["line"](batch["train"]["x"]).float()
        return {"mse": (line - 2).square().mean() * self.factor}, {"skip": batch["declines"]}


def fit(folder: Path, method: Fit, optim: Optim | None = None, **settings: Any) -> tuple[Result, list[Tensor]]:
    """The result, and the weight before each step and after the last."""
    run = settings_of(folder, **settings)
    result = train([Stage(method, STEPS, {"line": optim or Optim("sgd", lr=0.05)})], run)
    return result, [*method._weights, method.players["line"].weight.detach().clone()]


# ----------------------------------------------------------------------------------------------------------- SCHEDULES


def closed_form(schedule: str, step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * step / WARMUP
    share = (step - WARMUP) / (steps - WARMUP)
    return LR * {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[schedule]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_each_update_is_that_of_its_step(
    schedule: str, parts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step is an update, of however many micro-batches; what is logged is what was used."""
    used: list[float] = []
    plain = Player.schedule

    def note(player: Player, step: int) -> None:
        plain(player, step)
        used.append(player.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(Player, "schedule", note)
    optim = Optim("sgd", lr=LR, schedule=schedule, warmup=WARMUP)
    result, _ = fit(tmp_path, Fit(), optim, grad_accum_steps=parts)
    expected = [closed_form(schedule, step, STEPS) for step in range(STEPS)]
    assert used == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [line["lr/line"] for line in result.history] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [line["step"] for line in result.history] == list(range(1, STEPS + 1))


def test_a_turn_that_comes_rarely_follows_the_schedule_of_the_stage(tmp_path: Path) -> None:
    """Steps of the stage count, so that players of one stage end together."""
    stages, settings = MINIATURES["dmd2"](0, 20)
    optim = {"default": Optim(lr=LR, schedule="linear")}
    run = settings_of(tmp_path, **settings | {"noise_block": 2})
    history = train([Stage(stages[0].method, 20, optim)], run).history
    assert [line["lr/fake"] for line in history] == pytest.approx([LR * (1 - step / 20) for step in range(20)])
    assert [line["lr/generator"] for line in history] == pytest.approx([LR * (1 - step // 5 / 4) for step in range(20)])


# ------------------------------------------------------------------------------------------------------------ AVERAGES


def average_of(weights: list[Tensor], decay: float, warmup: bool) -> Tensor:
    """The closed form over the updates that happened: a weight that stayed to the bit was none."""
    value, number = weights[0].double(), 0
    for before, after in itertools.pairwise(weights):
        if not torch.equal(before, after):
            kept = min(decay, (1 + number) / (10 + number)) if warmup else decay
            value, number = kept * value + (1 - kept) * after.double(), number + 1
    return value


DECLINED = (0, 1, 4, 5, 6, 9)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(
    ("declines", "settings"),
    [((), {}), ((), {"grad_accum_steps": 4}), (DECLINED, {}), (DECLINED, {"grad_accum_steps": 2})],
)
def test_the_average_counts_updates_that_happened(
    declines: tuple[int, ...], settings: dict[str, Any], warmup: bool, tmp_path: Path
) -> None:
    result, weights = fit(tmp_path, Fit(declines), ema_decay=0.8, ema_warmup=warmup, **settings)
    still = [step for step, (a, b) in enumerate(itertools.pairwise(weights)) if torch.equal(a, b)]
    assert still == list(declines)
    torch.testing.assert_close(result.ema.weight.double(), average_of(weights, 0.8, warmup), rtol=1e-6, atol=1e-7)


def test_an_update_that_overflowed_was_none(tmp_path: Path) -> None:
    method = Fit(factor=100.0)
    settings = {"mixed_precision": "fp16", "ema_decay": 0.8, "ema_warmup": True}
    result, weights = fit(tmp_path, method, Optim("sgd", lr=1e-4), **settings)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[-2], weights[-1])
    torch.testing.assert_close(result.ema.weight.double(), average_of(weights, 0.8, True), rtol=1e-6, atol=1e-7)


def test_the_count_goes_on_in_a_run_that_is_continued(tmp_path: Path) -> None:
    settings = {"ema_decay": 0.9, "ema_warmup": True, "checkpoint_every": 5, "keep": 9}
    whole, _ = fit(tmp_path / "whole", Fit(DECLINED), **settings)
    resume = str(tmp_path / "whole" / "checkpoints" / "step_000000005")
    again = train(
        [Stage(Fit(DECLINED), STEPS, {"line": Optim("sgd", lr=0.05)})],
        settings_of(tmp_path / "again", resume=resume, **settings),
    )
    assert torch.equal(again.ema.weight, whole.ema.weight)


# --------------------------------------------------------------------------------------------------- IMAGES OF AN EPOCH


class Rows:
    """A map-style set whose samples say which they are; 10 of them and batches of 4 never end together."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((1, 2, 2), index / 10), "label": index}


def read(stream: Stream, steps: int, start: int = 0, **settings: Any) -> list[int]:
    """The samples of `steps` steps, in the order of the global batch."""
    run = Run("nowhere", batch_size=stream.batch_size, device="cpu", **settings)
    shares = Shares({"train": stream}, run, World(torch.device("cpu")))
    feed = shares.feed(start)
    rows = [row for _ in range(steps) for part in next(feed) for row in part["train"]["index"].tolist()]
    shares.close()
    return rows


WORKERS = [0, 2]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_image_of_an_epoch_once(workers: int, parts: int) -> None:
    """Over five epochs, of which four end inside a batch; also from the middle on."""
    seen = read(Stream(Rows(), 4, workers), 13, grad_accum_steps=parts)
    for epoch in range(5):
        assert Counter(seen[10 * epoch : 10 * (epoch + 1)]) == Counter(range(10)), epoch
    assert seen == read(Stream(Rows(), 4), 13)
    assert seen[7 * 4 :] == read(Stream(Rows(), 4, workers), 6, start=7, grad_accum_steps=parts)


def test_in_memory_they_are_the_same() -> None:
    data = TensorData({"image": torch.arange(10).view(-1, 1, 1, 1).expand(10, 1, 2, 2) / 10, "label": torch.arange(10)})
    assert read(Stream(data, 4), 200, grad_accum_steps=2) == read(Stream(Rows(), 4), 200)


class Heard(Stream):
    """Digits, and what was read of them."""

    rows: list[int] = []  # noqa: RUF012

    def __init__(self, batch_size: int) -> None:
        super().__init__(Digits("train", labels_per_class=10, unlabelled="drop"), batch_size)

    def open(self, *arguments: Any) -> Iterator[list[Batch]]:
        for parts in super().open(*arguments):
            for part in parts:
                Heard.rows += part["index"].tolist()
            yield parts


@pytest.mark.parametrize("parts", [1, 4])
def test_what_is_printed_and_logged_is_what_was_read(
    parts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Steps, and images a second over the time that they took; 100 images, batches of 24, 25 steps: six epochs."""
    clock = itertools.count(step := 0.5, step)
    monkeypatch.setattr(track, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(Heard, "rows", [])
    arguments = {
        "student": {"class_path": "visiondistill.models.SmallMLP", "init_args": {"in_features": 64, "hidden": [4]}},
        "terms": {"ce": {"class_path": "visiondistill.terms.CE"}},
        "streams": {"train": {"class_path": "test_counters.Heard", "init_args": {"batch_size": 24}}},
    }
    run = {"output_dir": str(tmp_path / "run"), "batch_size": 24, "device": "cpu", "log_every": 5, "proof_window": 2}
    method = {"class_path": "visiondistill.Distiller", "init_args": arguments}
    config = {"method": method, "steps": 25, "run": run | {"grad_accum_steps": parts, "noise_block": 1}}
    (tmp_path / "recipe.yaml").write_text(recipes.dump(config))
    assert main(["train", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    said = capfd.readouterr()
    # Of every epoch all images but those of the last, which 25 batches of 24 just fill.
    assert len(Heard.rows) == 25 * 24
    assert set(Counter(Heard.rows).values()) == {6}
    assert "steps: 25" in said.out
    assert "finished after step 25" in said.out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25]
    # The clock of the test moves on by half a second at each look: at the window's start and at its end.
    assert {line["images_per_second"] for line in lines} == {5 * 24 / 0.5}
    assert re.findall(r"step (\d+)/25 .* (\d+) images/s", said.err) == [(str(n), "240") for n in range(5, 26, 5)]


# --------------------------------------------------------------------------------------------------- NO UPDATE AT ALL


class Ending(Stream):
    """Ends after three steps, as no stream should."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__(Digits("train"), BATCH)
        self.steps = steps

    def open(self, *arguments: Any) -> Iterator[list[Batch]]:
        return itertools.islice(super().open(*arguments), self.steps)


def ending(steps: int) -> dict[str, Any]:
    return {"method.init_args.streams.train": {"class_path": "test_counters.Ending", "init_args": {"steps": steps}}}


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "no step": ({"steps": 0}, "steps"),
    "steps below zero": ({"steps": -5}, "steps"),
    "an empty set": ({"method.init_args.streams.train.class_path": "test_counters.Nothing"}, "is empty"),
    "an empty stream": (ending(0), "stream 'train' ended"),
    "a stream that ends": (ending(3), "stream 'train' ended"),
    "no batch": ({"run.batch_size": 0}, "batch_size"),
}


class Nothing(Stream):
    def __init__(self) -> None:
        super().__init__([], BATCH)


@pytest.mark.parametrize("kind", EMPTY)
def test_a_run_of_no_update_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    changes, told = EMPTY[kind]
    arguments = {
        "student": {"class_path": "visiondistill.models.SmallMLP", "init_args": {"in_features": 64, "hidden": [4]}},
        "terms": {"ce": {"class_path": "visiondistill.terms.CE"}},
        "streams": {"train": {"class_path": "test_counters.Ending", "init_args": {"steps": 9}}},
    }
    run = {"output_dir": str(tmp_path / "run"), "batch_size": BATCH, "device": "cpu", "progress": False}
    config = {"method": {"class_path": "visiondistill.Distiller", "init_args": arguments}, "steps": 9, "run": run}
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.override(config, changes)))
    assert main(["train", "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    assert told in capsys.readouterr().err


def test_a_turn_that_is_never_due_is_refused(tmp_path: Path) -> None:
    stages, settings = MINIATURES["dmd2"](0, 4)
    kind = type(stages[0].method)

    def turns(self: Method) -> tuple[Turn, ...]:
        return (Turn("late", self.student_loss, moves=("generator",), start=4), kind.turns(self)[1])

    override(stages[0].method, turns=turns)
    with pytest.raises(SettingsError, match="'late' is never due in the 4 steps"):
        train(stages, settings_of(tmp_path, **settings | {"noise_block": 2}))


NEVER: dict[str, Callable[[], tuple[Fit, dict[str, Any]]]] = {
    "declined": lambda: (Fit(tuple(range(STEPS))), {}),
    "overflowed": lambda: (Fit(factor=1e15), {"mixed_precision": "fp16"}),
}


@pytest.mark.parametrize("window", [0, 5, 50])
@pytest.mark.parametrize("kind", NEVER)
def test_a_run_whose_every_update_was_skipped_is_an_error(kind: str, window: int, tmp_path: Path) -> None:
    method, settings = NEVER[kind]()
    with pytest.raises(NotLearning, match=r"stage 'main' trained nothing: every update was skipped \({'fit': 12}\)"):
        fit(tmp_path, method, proof_window=window, **settings)
    assert not list((tmp_path / "checkpoints").glob("step_*")), "there is nothing worth keeping"


def test_one_update_is_enough(tmp_path: Path) -> None:
    result, weights = fit(tmp_path, Fit(tuple(range(STEPS - 1))))
    assert result.reason == "finished"
    assert not torch.equal(weights[-2], weights[-1])


def test_a_part_that_declines_all_the_time_ends_no_run(tmp_path: Path) -> None:
    """Only the product must move; the proof of learning tells of others."""
    stages, settings = adversarial(0, 6, limit=-1.0)
    result = train(stages, settings_of(tmp_path, **settings | {"noise_block": 2, "proof_window": 3}))
    assert result.reason == "finished"
    assert result.proofs["main"].declined == ["augmentor"]
