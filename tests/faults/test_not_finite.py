"""NaN and infinity, wherever they come from, end a run of the command line before anything moves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import POISONED_TERM, Job, assert_same, play, poisoned, state
from miniatures import MINIATURES
from torch import Tensor, nn

from visiondistill import recipes
from visiondistill.cli import main
from visiondistill.data import Digits, Stream
from visiondistill.engine import Batch, Carry, Turn
from visiondistill.engine.assembly import Assembly
from visiondistill.engine.replay import replay as replay_on
from visiondistill.terms import Needs, Term, View
from visiondistill.workbench import replay

POISON, STEPS, BATCH = 7, 14, 16
MARK = 2.0
"""First pixel of the last image of step `POISON`; all others are in [0, 1]."""


class Marked(Stream):
    """Digits, with the mark, or another pixel value in its place."""

    def __init__(self, pixel: str = str(MARK), step: int = POISON) -> None:
        super().__init__(Digits("train"), BATCH)
        self.pixel, self.step = float(pixel), step

    def open(
        self, start: int, rows: Sequence[tuple[int, int]], seed: int, device: torch.device | None = None
    ) -> Iterator[list[Batch]]:
        for step, parts in enumerate(super().open(start, rows, seed, device), start):
            for (_, high), part in zip(rows, parts, strict=True):
                if step == self.step and high == BATCH:
                    part["image"] = part["image"].clone()
                    part["image"][-1, 0, 0, 0] = self.pixel
            yield parts


def gap(image: Tensor) -> Tensor:
    """`[B]`: 0 for the marked image alone."""
    return MARK - image[:, 0, 0, 0]


class Teacher(nn.Module):
    """Untrained; its answer to the marked image is infinite where `fragile`."""

    def __init__(self, fragile: bool = False) -> None:
        super().__init__()
        self.net, self.fragile, self.num_classes = nn.Linear(64, 10), fragile, 10

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x.flatten(1))
        return logits / gap(x)[:, None] if self.fragile else logits


class Logarithm(Term):
    """Infinite for the marked image."""

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs()

    def forward(self, view: View) -> Tensor:
        return view.logits.square().mean(1) - gap(view.batch["train"]["image"]).log()


class Slope(Term):
    """Always finite; its slope is not, for the marked image."""

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs()

    def forward(self, view: View) -> Tensor:
        still = (view.logits - view.logits.detach()).square().sum(1)
        return view.logits.square().mean(1) + (still + gap(view.batch["train"]["image"])).sqrt()


class Stored(Term):
    """Draws logits to stored ones of each class. A marked image spoils those: the step after it must not use them."""

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs(label=True)
        self.register_buffer("means", torch.zeros(10, 10))

    def forward(self, view: View) -> Tensor:
        view.carry["label"], view.carry["logits"] = view.label, view.logits / gap(view.batch["train"]["image"])[:, None]
        return (view.logits - self.means[view.label]).square().sum(1).clamp(max=50.0) + 0 * self.means.sum()

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        return {"means": (carry["label"], carry["logits"])}


class Judge(Term):
    """Cross-entropy, and a player with a turn of its own, whose term is infinite for the marked image."""

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs()
        self.players["judge"] = nn.Linear(64, 1)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("judge", self.judge_loss, moves=("judge",)),)

    def judge_loss(self, batch: Batch) -> tuple[dict[str, Tensor], Carry]:
        image = batch["train"]["image"]
        return {"fit": (self.players["judge"](image.flatten(1)).square()[:, 0] / gap(image)).mean()}, {}

    def forward(self, view: View) -> Tensor:
        return view.logits.square().mean(1)


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"test_not_finite.{name}", "init_args": arguments}


def recipe(folder: Path, change: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A student with BatchNorm, its average, momentum and two terms; `change` over the method's arguments."""
    library = "visiondistill.terms"
    arguments = {
        "student": {"class_path": "visiondistill.models.SmallConvNet", "init_args": {"widths": [4], "norm": "batch"}},
        "teacher": part("Teacher"),
        "terms": {"ce": {"class_path": f"{library}.CE"}, "kd": {"class_path": f"{library}.KL"}},
        "streams": {"train": part("Marked")},
    }
    change = change | {"terms": arguments["terms"] | change.get("terms", {})}
    run = {"output_dir": str(folder), "batch_size": BATCH, "device": "cpu", "ema_decay": 0.9, "progress": False}
    return {
        "method": {"class_path": "visiondistill.Distiller", "init_args": arguments | change},
        "steps": STEPS,
        "optim": {"default": {"name": "adamw", "lr": 1e-2}},
        "run": run | {"log_every": 1, "checkpoint_every": 5} | settings,
    }


FIRST_WEIGHT = "student: players.student.model.stages.0.0.weight"

PLACES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "term": ({"terms": {"log": part("Logarithm")}}, POISON, "student", "student/log"),
    "teacher": ({"teacher": part("Teacher", fragile=True)}, POISON, "student", "teacher.logits"),
    "gradient": (
        {"terms": {"slope": part("Slope")}},
        POISON,
        "student",
        FIRST_WEIGHT,
    ),
    "image": ({"streams": {"train": part("Marked", pixel="nan")}}, POISON, "student", "train.image"),
    "infinite image": ({"streams": {"train": part("Marked", pixel="inf")}}, POISON, "student", "train.image"),
    "stored target": ({"terms": {"stored": part("Stored")}}, POISON + 1, "student", "parts.stored.means"),
    "second turn": ({"terms": {"judge": part("Judge")}}, POISON, "judge", "judge/fit"),
}
"""What is changed, the first step and turn that must not happen, and the cause that must be named first."""


@pytest.fixture
def assemblies(monkeypatch: pytest.MonkeyPatch) -> list[Assembly]:
    """All that a run trains, though it fails."""
    made: list[Assembly] = []
    start = Assembly.__init__

    def note(self: Assembly, *args: Any) -> None:
        start(self, *args)
        made.append(self)

    monkeypatch.setattr(Assembly, "__init__", note)
    return made


def everything(assembly: Assembly) -> dict[str, Tensor]:
    """Weights, buffers, state, average and optimisers."""
    return {f"{kind}/{name}": x.clone() for kind, group in assembly.pack()[0].items() for name, x in group.items()}


def fails(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture) -> str:
    """Train by the command line; the message of the failure."""
    file = folder / "recipe.yaml"
    file.write_text(recipes.dump(config))
    capsys.readouterr()
    assert main(["train", "--recipe", str(file)]) == 3
    return capsys.readouterr().err


SETTINGS: dict[str, dict[str, Any]] = {
    "polled": {},
    "late": {"log_every": 50, "checkpoint_every": 50},
    "accumulated": {"grad_accum_steps": 2, "log_every": 50},
    "bf16": {"mixed_precision": "bf16", "log_every": 50},
    "compiled": {"compile": True, "compile_backend": "eager", "log_every": 50},
}

CASES = [(place, "polled") for place in PLACES]
CASES += [(place, how) for how in SETTINGS for place in ("second turn", "stored target") if how != "polled"]
CASES += [("gradient", "accumulated"), ("teacher", "bf16"), ("gradient", "compiled")]


@pytest.mark.parametrize(("place", "how"), CASES)
def test_nothing_moves_and_the_cause_is_named_and_replayed(
    place: str, how: str, assemblies: list[Assembly], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, first, turn, cause = PLACES[place]
    settings = SETTINGS[how]
    said = fails(recipe(tmp_path / "run", change, **settings), tmp_path, capsys)
    for words in (f"step {first} of stage 'main', turn '{turn}'", "not finite", f"'{cause}'", "Nothing was updated"):
        assert words in said, said
    for cure in ("optim.*.lr", "optim.*.clip", "inputs"):
        assert cure in said

    clean = recipe(tmp_path / "clean", change, **settings) | {"steps": first}
    if place != "stored target":
        clean = recipes.override(clean, {"method.init_args.streams.train.init_args.step": -1})
    recipes.run(clean)
    failed, good = map(everything, assemblies)
    if turn != "student":
        # The student's turn of the same step was in order, and happened.
        head = "weights/players.student.model.head.weight"
        assert not torch.equal(failed[head], good[head])
        failed, good = ({name: x for name, x in each.items() if "judge" in name} for each in (failed, good))
    assert_same(bits(failed), bits(good))

    (folder,) = (tmp_path / "run" / "replay").iterdir()
    found = replay(folder)
    assert found["not_finite"][0] == cause
    assert_equal_findings(found, json.loads((folder / "meta.json").read_text()))


def assert_equal_findings(found: dict[str, Any], kept: dict[str, Any]) -> None:
    assert found["not_finite"] == kept["not_finite"]
    # Within rounding: rows of a larger tensor lie in memory otherwise than those of a file.
    assert found["terms"] == pytest.approx(kept["terms"], rel=1e-5, nan_ok=True)
    assert not all(map(math.isfinite, found["terms"].values())) or found["not_finite"][0].startswith("student: ")


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As integers, so that a NaN equals itself."""
    return {name: x.contiguous().reshape(-1).view(torch.uint8) for name, x in tensors.items()}


def test_a_later_stage_is_replayed_on_what_the_earlier_one_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = recipe(tmp_path / "run", {})
    first, second = (recipe(tmp_path, change)["method"] for change in ({}, {"terms": {"log": part("Logarithm")}}))
    first["init_args"] |= {"teacher": None, "terms": {"ce": first["init_args"]["terms"]["ce"]}}
    first["init_args"]["streams"] = {"train": part("Marked", step=-1)}
    del first["init_args"]["teacher"], second["init_args"]["teacher"]
    stages = {"teach": {"method": first, "steps": 5}, "distil": {"method": second, "steps": STEPS}}
    said = fails({"stages": stages, "run": config["run"]}, tmp_path, capsys)
    assert f"step {POISON} of stage 'distil'" in said
    (folder,) = (tmp_path / "run" / "replay").iterdir()
    kept = json.loads((folder / "meta.json").read_text())
    assert_equal_findings(replay(folder), kept)
    (tmp_path / "run" / "checkpoints" / "stage_0_teach" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        replay(folder)


def test_what_is_no_kept_step_is_not_replayed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        replay(tmp_path)


MINIATURE_SETTINGS = {
    "accumulated": {"grad_accum_steps": 2, "log_every": 50},
    "compiled": {"compile": True, "compile_backend": "eager", "log_every": 50},
}


@pytest.mark.parametrize("how", MINIATURE_SETTINGS)
@pytest.mark.parametrize("name", ["dmd2", "adversarial", "projected", "relational"])
def test_so_it_is_with_turns_of_every_kind(name: str, how: str, tmp_path: Path) -> None:
    """Two turns, a turn that declines, a combined gradient, a loss between rows that is played whole."""
    settings = MINIATURE_SETTINGS[how]
    before = play(Job("good", name, signal_at=POISON - 1, settings=settings), tmp_path)
    job = poisoned(name, POISON)
    after = play(Job("bad", name, settings=settings, poison_at=POISON), tmp_path)
    assert job.poison_at == POISON
    assert_same(after.weights, before.weights)
    turn, term = POISONED_TERM[name]
    for words in (f"step {POISON} ", turn, f"'{term}'"):
        assert words in after.error, after.error
    (folder,) = (tmp_path / "bad" / "replay").iterdir()
    fresh = MINIATURES[name](3, 20)[0][0].method
    assert term in replay_on(fresh, folder)["not_finite"]
    players = {key: value for key, value in state(fresh).items() if ".players." in key}
    assert_same(players, {key: after.weights[key] for key in players})
