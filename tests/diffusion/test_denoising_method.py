"""Training of teachers: its loss by hand, its optimum, its laws, and the engine's promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import (
    CLASSES,
    ROWS,
    SHAPE,
    by_formula,
    each_turn_is_one_graph,
    play,
    prepared,
    small_draw,
    small_generator,
    small_images,
    small_streams,
    weights,
)
from torch import nn

from diffusion.codecs import Pixels
from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.losses import edm_loss_weight
from diffusion.methods.denoising import Denoising, usual_law
from diffusion.methods.dmd2 import DMD2
from diffusion.process import ContinuousVPProcess, EDMProcess, FlowProcess, Process, TimeLaw, TrigProcess, VPProcess
from visiondistill.data import Stream, TensorData

FAMILIES = [
    (EDMProcess(), "x0"),
    (FlowProcess(), "velocity"),
    (VPProcess.from_betas(), "eps"),
    (VPProcess.from_betas(), "v"),
    (TrigProcess(0.5), "velocity"),
    (ContinuousVPProcess(), "v"),
]


def method(process: Process | None = None, kind: str = "x0", **options) -> Denoising:
    return Denoising(small_generator(process, kind), small_streams(), **options)


# --- the loss


@pytest.mark.parametrize(("process", "kind"), FAMILIES, ids=str)
def test_the_loss_by_hand(process: Process, kind: str):
    m = method(process, kind)
    batch = prepared(m, ("student",))
    codes = 2 * batch["train"]["image"] - 1
    noise, t = batch["noised"]["noise"], batch["noised"]["t"]

    def full(coefficient: torch.Tensor) -> torch.Tensor:
        return coefficient.view(-1, 1, 1, 1)

    a, s = full(process.alpha(t)), full(process.sigma(t))
    prediction = m.players["student"].network(a * codes + s * noise, t, batch["condition"])
    target = {"x0": codes, "eps": noise, "v": a * noise - s * codes}.get(kind)
    if kind == "velocity":
        target = full(process.alpha_prime(t)) * codes + full(process.sigma_prime(t)) * noise
    weight = full(1 / t**2 + 4) if kind == "x0" else 1
    torch.testing.assert_close(m.student_loss(batch)[0]["denoising"], (weight * (prediction - target) ** 2).mean())


@pytest.mark.parametrize("space", ["x0", "eps", "v", "velocity"])
def test_the_error_can_be_taken_in_another_space(space: str):
    m = method(FlowProcess(), "velocity", space=space, sigma_data=None)
    batch = prepared(m, ("student",))
    sample = m.process.noised(batch["x0"], **batch["noised"])
    prediction = m.players["student"](sample.x_t, sample.t, batch["condition"])
    expected = (prediction.of(space) - sample.of(space)).square().mean()
    torch.testing.assert_close(m.student_loss(batch)[0]["denoising"], expected)


def test_edms_weight_can_be_left_out_and_its_sigma_data_set():
    plain, own = (method(sigma_data=value) for value in (None, 0.3))
    batch = prepared(plain, ("student",))
    sample = plain.process.noised(batch["x0"], **batch["noised"])
    squares = (plain.players["student"](sample.x_t, sample.t, batch["condition"]).x0 - sample.x0).square()
    torch.testing.assert_close(plain.student_loss(batch)[0]["denoising"], squares.mean())
    weighted = (edm_loss_weight(sample.t, 0.3).view(-1, 1, 1, 1) * squares).mean()
    torch.testing.assert_close(own.student_loss(batch)[0]["denoising"], weighted)


class Posterior(nn.Module):
    """The exact prediction for data N(mean, std^2), times a factor that training would find."""

    def __init__(self, process: Process, kind: str, mean: float, std: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.process, self.kind, self.mean, self.std = process, kind, mean, std

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: None = None) -> torch.Tensor:
        a, s = (f(t).view(-1, 1, 1, 1) for f in (self.process.alpha, self.process.sigma))
        x0 = self.mean + a * self.std**2 / ((a * self.std) ** 2 + s**2) * (x - a * self.mean)
        return self.factor * self.process.convert(x0, x, t, "x0", self.kind)


@pytest.mark.parametrize(("process", "kind"), FAMILIES, ids=str)
def test_its_optimum_is_the_exact_posterior_mean(process: Process, kind: str):
    """The loss is a parabola in the factor; its vertex must lie at 1."""
    rows = 4000
    generator = Generator(Denoiser(Posterior(process, kind, 0.4, 0.5), process, kind), SHAPE)
    m = Denoising(generator, {"train": Stream(small_images(), ROWS)})
    x0 = 0.4 + 0.5 * torch.randn(rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = {"x0": x0, "noised": prepared_noise(m, rows), "condition": None}
    losses = []
    for factor in (0.5, 1.0, 1.5):
        m.players["student"].network.factor.data.fill_(factor)
        losses.append(m.student_loss(batch)[0]["denoising"].item())
    low, middle, high = losses
    vertex = 1 + 0.25 * (low - high) / (low + high - 2 * middle)
    assert vertex == pytest.approx(1.0, abs=0.02)
    assert middle < min(low, high)


def prepared_noise(m: Denoising, rows: int) -> dict:
    return m._noise("noised", m.times, small_draw(rows=rows))


# --- noise levels and labels


def test_teachers_are_trained_at_the_levels_of_their_kind():
    assert usual_law(EDMProcess()) == TimeLaw("lognormal", low=0.002, high=80.0, mean=-1.2, std=1.2)
    assert usual_law(FlowProcess()).law == "logit_normal"
    assert usual_law(VPProcess.from_betas()) == TimeLaw("index", low=0, high=999)
    assert usual_law(TrigProcess()) == TrigProcess().time_law()
    t = prepared_noise(method(), 20_000)["t"].log()
    assert t.mean().item() == pytest.approx(-1.2, abs=0.05)
    assert t.std().item() == pytest.approx(1.2, abs=0.05)
    own = TimeLaw("uniform", low=2.0, high=3.0)
    assert prepared(method(times=own), ("student",))["noised"]["t"].min() >= 2


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_the_labels_is_dropped_for_the_null_label(share: float):
    rows = 40 * 20
    m = Denoising(small_generator(), small_streams(rows), label_dropout=share)
    batch = prepared(m, ("student",), rows=rows)
    condition, label = batch["condition"], batch["train"]["label"]
    dropped = condition != label
    assert (condition[dropped] == CLASSES).all()
    assert dropped.double().mean().item() == pytest.approx(share, abs=0.05)


def test_data_without_labels_are_refused_where_labels_are_conditions():
    image = small_images().columns["image"]
    streams = {"train": Stream(TensorData({"image": image}), ROWS)}
    with pytest.raises(ValueError, match="no labels"):
        Denoising(small_generator(), streams)
    free = Denoising(small_generator(conditional=False), streams)
    assert prepared(free, ("student",))["condition"] is None


def test_codes_that_the_data_hold_are_taken_as_they_are():
    codes = torch.randn(20, *SHAPE, dtype=torch.float64)
    streams = {"train": Stream(TensorData({"code": codes, "label": torch.arange(20) % CLASSES}), ROWS)}
    batch = prepared(Denoising(small_generator(), streams), ("student",))
    assert torch.equal(batch["x0"], codes[batch["train"]["index"]])


def test_without_a_null_label_none_can_be_dropped():
    generator = Generator(small_generator().denoiser, SHAPE, conditions=ClassLabels(CLASSES, null=False))
    with pytest.raises(ValueError, match="needs a null condition"):
        Denoising(generator, small_streams())
    m = Denoising(generator, small_streams(), label_dropout=0.0)
    batch = prepared(m, ("student",))
    assert torch.equal(batch["condition"], batch["train"]["label"])
    with pytest.raises(ValueError, match="null conditions"):
        DMD2(generator, guidance_scale=2.0)


def test_images_go_through_the_codec_once_and_without_a_graph():
    class Counting(Pixels):
        def __init__(self):
            super().__init__(0.0, 3.0)
            self.scale, self.graphs = nn.Parameter(torch.ones(())), []

        def encode(self, images):
            self.graphs.append(torch.is_grad_enabled())
            return super().encode(images) * self.scale.detach()

    codec = Counting()
    m = Denoising(Generator(small_generator(conditional=False).denoiser, SHAPE, codec=codec), small_streams())
    batch = prepared(m, ("student",))
    m.student_loss(batch)
    torch.testing.assert_close(batch["x0"], 3 * batch["train"]["image"])
    assert codec.graphs == [False]
    assert not codec.scale.requires_grad


def test_frames_of_a_video_may_have_noise_levels_of_their_own():
    shape = (4, 1, 4, 4)
    m = Denoising(small_generator(FlowProcess(), "velocity", shape=shape), small_streams(), frame_block=3)
    noise = prepared_noise(m, 6)
    assert noise["t"].shape == (6, 4)
    assert torch.equal(noise["t"][:, 0], noise["t"][:, 2])
    assert not torch.equal(noise["t"][:, 0], noise["t"][:, 3])
    batch = {"x0": torch.randn(6, *shape).double(), "noised": noise, "condition": torch.zeros(6).long()}
    m.student_loss(batch)[0]["denoising"].backward()
    assert m.players["student"].network.encoder.weight.grad.abs().max() > 0


# --- on the engine


def test_what_is_handed_on_samples_as_the_generator_that_came(tmp_path: Path):
    came = small_generator(steps=7, guidance_scale=2.0, sampler="euler")
    m = Denoising(came, small_streams())
    before = weights(came)
    result = play(m, tmp_path, 4, ema_decay=0.5)
    handed_over = m.handover()
    assert handed_over.denoiser is m.product() is came.denoiser
    assert (handed_over.steps, handed_over.guidance_scale, handed_over.sampler) == (7, 2.0, "euler")
    assert m.generator(result.ema).denoiser is result.ema
    assert not torch.equal(weights(came), before)


def test_it_learns(tmp_path: Path):
    label = torch.arange(30) % CLASSES
    image = (label.double() / (CLASSES - 1)).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    streams = {"train": Stream(TensorData({"image": image, "label": label}), ROWS)}
    m = Denoising(small_generator(FlowProcess(), "velocity"), streams, label_dropout=0.0)
    losses = [line["student/denoising"] for line in play(m, tmp_path, 200).history]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_micro_batches_see_the_same_noise(tmp_path: Path):
    whole, halves = method(label_dropout=0.5), method(label_dropout=0.5)
    play(whole, tmp_path / "1", noise_block=4)
    play(halves, tmp_path / "2", noise_block=4, grad_accum_steps=2)
    torch.testing.assert_close(weights(halves), weights(whole), rtol=1e-9, atol=1e-10)


def test_its_turn_is_one_graph(tmp_path: Path):
    each_turn_is_one_graph(lambda: method(label_dropout=0.5), tmp_path)


def test_a_resumed_run_continues_identically(tmp_path: Path):
    whole, again = method(), method()
    play(whole, tmp_path / "whole", 7, checkpoint_every=3, keep=10)
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000003")
    play(again, tmp_path / "again", 7, checkpoint_every=3, resume=middle)
    assert torch.equal(weights(again), weights(whole))


def test_golden_curve(tmp_path: Path, equals_golden):
    m = Denoising(by_formula(small_generator()), small_streams())
    result = play(m, tmp_path, 8, ema_decay=0.9)
    curve = {"student/denoising": [line["student/denoising"] for line in result.history]}
    curve["average"] = [sum(tensor.sum().item() for tensor in result.ema.state_dict().values())]
    equals_golden("denoising", curve)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"space": "score"}, "'velocity'"),
        ({"streams": {}}, "name the data"),
        ({"frame_block": 1}, "videos"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Denoising(small_generator(), **{"streams": small_streams()} | options)


@pytest.mark.parametrize(
    ("options", "message"), [({"space": "velocity"}, "a table"), ({"times": TimeLaw(high=2000.0)}, "end at 999")]
)
def test_what_a_table_lacks_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Denoising(small_generator(VPProcess.from_betas(), "eps"), small_streams(), **options)
