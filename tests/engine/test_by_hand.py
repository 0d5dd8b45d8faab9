"""The engine against the loop that one would write by hand for one method."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from harness import apart, state, train_stages
from miniatures import BATCH, MINIATURES, SETTINGS
from torch import Tensor, nn

from visiondistill.engine import Batch, Draw, Method, Optim, Stage
from visiondistill.engine.rng import key

STEPS = 20
ROWS = {"": (0, BATCH), "train": (0, BATCH)}


def prepared(method: Method, due: dict[int, frozenset[str]]) -> list[Batch]:
    """What a run of seed 0 prepares, for methods whose `prepare` reads frozen networks and noise alone."""
    cpu = torch.device("cpu")
    feeds = {name: stream.open(0, [(0, BATCH)], key(0, name), cpu) for name, stream in method.streams.items()}
    batches = []
    for step in range(STEPS):
        draw = Draw(0, step, ROWS, SETTINGS["noise_block"], torch.device("cpu"), torch.float64)
        batches.append({name: next(feed)[0] for name, feed in feeds.items()} | {"draw": draw, "due": due.get(step)})
    return batches


def follow(average: dict[str, Tensor], module: nn.Module) -> None:
    for name, value in state(module).items():
        average[name].lerp_(value, 1 - SETTINGS["ema_decay"])


def test_two_players_clipping_momentum_decay_and_schedule(tmp_path: Path) -> None:
    (stage,), settings = MINIATURES["mutual"](0, STEPS)
    optim = {
        "left": Optim("sgd", lr=0.1, clip=0.5, options={"momentum": 0.9}),
        "right": Optim(lr=1e-2, weight_decay=0.1, schedule="cosine", warmup=4, options={"betas": [0.8, 0.95]}),
    }
    method = copy.deepcopy(stage.method)
    outcome = train_stages([Stage(stage.method, STEPS, optim)], settings, tmp_path)

    left, right = method.players["left"], method.players["right"]
    decayed = [p for p in right.parameters() if p.ndim > 1]
    others = [p for p in right.parameters() if p.ndim <= 1]
    first = torch.optim.SGD(left.parameters(), lr=0.1, momentum=0.9, nesterov=True)  # as timm has it
    second = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.95)
    )
    average = state(left)
    norms = []
    for step, batch in enumerate(prepared(method, {})):
        terms, _ = method.loss(batch)
        first.zero_grad()
        second.zero_grad()
        sum(terms.values()).backward()
        norms.append(nn.utils.clip_grad_norm_(left.parameters(), 0.5))
        rate = outcome.history[step]["lr/right"]
        for group in second.param_groups:
            group["lr"] = rate
        first.step()
        second.step()
        follow(average, left)
        for name, term in terms.items():
            assert outcome.curve[step + 1, f"both/{name}"] == pytest.approx(float(term.detach()), abs=1e-12)
    assert min(norms) < 0.5 < max(norms)
    assert apart(state(method), outcome.weights) < 1e-12
    assert apart(average, outcome.ema) < 1e-7  # whose weight is fp32


def test_schedule_warms_up_and_falls_to_zero(tmp_path: Path) -> None:
    """Linear from 0 to the peak over the warm-up, then half a cosine over the whole stage, ending near 0."""
    stages, settings = MINIATURES["mutual"](0, STEPS)
    rates = [row["lr/right"] for row in train_stages(stages, settings, tmp_path).history]
    assert rates[:3] == pytest.approx([0.0, 1e-2 / 3, 2e-2 / 3])
    assert rates[3] == max(rates)
    assert rates[3] == pytest.approx(1e-2, rel=0.06)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 1e-4


def test_two_turns_on_one_batch(tmp_path: Path) -> None:
    """DMD2: the critic learns from the images of before the student's update."""
    (stage,), settings = MINIATURES["dmd2"](0, STEPS)
    method = copy.deepcopy(stage.method)
    outcome = train_stages([stage], settings, tmp_path)

    generator, fake, head = (method.players[name] for name in ("generator", "fake", "head"))
    student = torch.optim.AdamW(generator.parameters(), lr=1e-2, betas=(0.0, 0.99), weight_decay=0.0)
    critic = torch.optim.AdamW([*fake.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.0)
    due = {step: frozenset({"student", "critic"} if step % 5 == 0 else {"critic"}) for step in range(STEPS)}
    for raw in prepared(method, due):
        with torch.no_grad():
            batch = method.prepare(raw, raw["draw"], raw["due"])
        if "student" in raw["due"]:
            terms, carry = method.student_loss(batch)
            student.zero_grad()
            sum(terms.values()).backward()
            student.step()
            batch = batch | {"images": carry["images"].detach()}
        terms, _ = method.critic_loss(batch)
        critic.zero_grad()
        sum(terms.values()).backward()
        for player in (fake, head):
            nn.utils.clip_grad_norm_(player.parameters(), 10.0)
        critic.step()
    assert apart(state(method), outcome.weights) < 1e-12
