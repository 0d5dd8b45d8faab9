"""DMD and Diff-Instruct, the settings of DMD2 that they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small import (
    SHAPE,
    by_formula,
    each_turn_is_one_graph,
    moved_apart,
    play,
    prepared,
    reached,
    small_generator,
    small_streams,
    weights,
)

from diffusion.critics import GAN
from diffusion.losses import regression_loss
from diffusion.methods.dmd2 import DMD2, Regression
from diffusion.pairs import store_pairs
from visiondistill.engine.errors import NonFinite, ResumeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(store_pairs(small_generator(), 24, tmp_path_factory.mktemp("pairs"), steps=3))


def dmd(folder: str, **options) -> DMD2:
    torch.manual_seed(1)
    options = {"student_every": 1} | options
    return DMD2(small_generator(), regression=Regression(folder, 8, **options.pop("regression", {})), **options)


@pytest.mark.parametrize("kind", ["l2", "pseudo_huber"])
def test_the_regression_is_on_what_the_teacher_made_of_the_same_noise(kind: str, folder: str):
    m = moved_apart(dmd(folder, regression={"weight": 0.5, "kind": kind}))
    batch = prepared(m)
    terms, carry = m.student_loss(batch)
    pairs = batch["pairs"]
    made = m.players["student"](80 * pairs["noise"].double(), 80.0, pairs["condition.0"]).x0
    torch.testing.assert_close(terms["regression"], 0.5 * regression_loss(made, pairs["code"].double(), kind=kind))
    assert "decoder" in reached(terms["regression"], m.players["student"])
    assert not torch.equal(carry["images"], made), "the critic learns from fresh noise"


def test_without_weight_it_is_dmd2_bit_for_bit(folder: str, tmp_path: Path):
    off, plain = dmd(folder, regression={"weight": 0.0}), DMD2(small_generator(), student_every=1)
    on = dmd(folder)
    for name, m in (("off", off), ("plain", plain), ("on", on)):
        play(m, tmp_path / name, 5)
    assert torch.equal(weights(off.players), weights(plain.players))
    assert not torch.equal(weights(on.players), weights(plain.players))


def test_the_default_weight_is_the_one_that_belongs_to_a_mean_over_pixels():
    assert Regression("pairs", 8).weight == 5.0


def test_each_turn_is_one_graph(folder: str, tmp_path: Path):
    each_turn_is_one_graph(lambda: dmd(folder), tmp_path)


def test_a_pair_that_is_not_finite_ends_the_run_before_anything_moves(folder: str, tmp_path: Path):
    m = dmd(folder)
    m.streams["pairs"].data.columns["code"][:] = float("nan")
    before = weights(m.players)
    with pytest.raises(NonFinite, match="student/regression"):
        play(m, tmp_path, 3)
    assert torch.equal(weights(m.players), before)


def test_another_teachers_pairs_are_refused(folder: str):
    with pytest.raises(ValueError, match="made otherwise: weights"):
        DMD2(small_generator(seed=4), regression=Regression(folder, 8))


@pytest.mark.parametrize(("options", "message"), [({"kind": "l1"}, "pseudo_huber"), ({"weight": -1.0}, "0 or more")])
def test_impossible_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Regression("pairs", 8, **options)


def test_a_run_with_everything_resumes_in_mid_cycle(folder: str, tmp_path: Path):
    def method() -> DMD2:
        return dmd(folder, gan=GAN(r1=1.0), streams=small_streams(), student_every=3, student_steps=2)

    whole, again = method(), method()
    run = {"checkpoint_every": 4, "keep": 10, "ema_decay": 0.9}
    one = play(whole, tmp_path / "whole", 9, **run)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000004")
    other = play(again, tmp_path / "again", 9, resume=middle, **run)
    assert torch.equal(weights(again.players), weights(whole.players))
    assert torch.equal(weights(other.ema), weights(one.ema))


def test_a_run_goes_on_with_the_same_pairs_wherever_they_lie_and_with_no_others(folder: str, tmp_path: Path):
    run = {"checkpoint_every": 2, "resume": "auto"}
    play(dmd(folder), tmp_path / "run", 4, **run)
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1])
    other = str(store_pairs(small_generator(), 24, tmp_path / "other", seed=1, steps=3))
    with pytest.raises(ResumeError, match="contents"):
        play(dmd(other), tmp_path / "run", 4, **run)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert play(dmd(str(moved)), tmp_path / "run", 4, **run).reason == "finished"


def test_diff_instruct_moves_by_the_difference_of_the_scores_alone():
    """Its own gradient, (fake - real)/B, is ours times the elements of a sample."""
    m = moved_apart(DMD2(small_generator(), normalize=False, student_every=1))
    batch = prepared(m)
    x = m.generate(**batch["input"], condition=batch["condition"]).detach().requires_grad_(True)
    m.generate = lambda *_, **__: x
    terms, _ = m.student_loss(batch)
    terms["dmd"].backward()
    x_t, t, c = m.process.add_noise(x.detach(), **batch["score"]), batch["score"]["t"], batch["condition"]
    fake, real = m.players["fake_score"](x_t, t, c).x0, m.frozen["teacher"].denoiser(x_t, t, c).x0
    torch.testing.assert_close(x.grad * SHAPE[0] * SHAPE[1] * SHAPE[2], (fake - real).detach() / len(x))


def test_golden_curve(tmp_path: Path, equals_golden):
    """With pairs, an adversarial term and two steps, in double precision and against numbers that are kept."""
    teacher = by_formula(small_generator())
    folder = str(store_pairs(teacher, 24, tmp_path / "pairs", steps=3))
    m = DMD2(
        teacher,
        streams=small_streams(),
        gan=GAN(r1=1.0, generator_weight=0.1, critic_weight=0.1),
        regression=Regression(folder, 8),
        student_every=2,
        student_steps=2,
    )
    by_formula(m.players["discriminator"])
    result = play(m, tmp_path / "run", 8, ema_decay=0.9)
    names = [f"student/{n}" for n in ("dmd", "gan", "regression")] + [f"critic/{n}" for n in ("denoising", "gan", "r1")]
    curve = {name: [line[name] for line in result.history if name in line] for name in names}
    curve["average"] = [sum(tensor.sum().item() for tensor in result.ema.state_dict().values())]
    equals_golden("dmd2_gan_pairs", curve)


@pytest.mark.parametrize("kind", ["l2", "pseudo_huber"])
def test_regression_loss(kind: str):
    x, y = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    values = regression_loss(x, y, kind=kind, reduction="none")
    rms = (x - y).square().flatten(1).mean(1).sqrt()
    expected = rms**2 if kind == "l2" else torch.hypot(rms, torch.tensor(0.00054)) - 0.00054
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(regression_loss(x, y, kind=kind), values.mean())
    x.requires_grad_(True)
    y.requires_grad_(True)
    regression_loss(x.clone(), x.detach(), kind=kind).backward()
    assert x.grad.abs().max() == 0, "its gradient at the target is 0, not nan"
    regression_loss(x, y, kind=kind).backward()
    assert y.grad is None
    assert regression_loss(x.bfloat16(), y.bfloat16(), kind=kind).dtype == torch.float32
    with pytest.raises(ValueError, match="'l2', 'pseudo_huber'"):
        regression_loss(x, y, kind="lpips")
