"""DMD2's adversarial term: which gradient goes where, on what it judges, and the engine's promises with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch._dynamo
from small import (
    CLASSES,
    ROWS,
    SHAPE,
    each_turn_is_one_graph,
    moved_apart,
    play,
    prepared,
    reached,
    small_generator,
    small_images,
    small_streams,
    weights,
)

from diffusion.critics import GAN
from diffusion.losses import gan_discriminator_loss, gan_generator_loss
from diffusion.methods.dmd2 import DMD2
from diffusion.process import EDMProcess, FlowProcess, Process, TimeLaw, VPProcess
from visiondistill.data import Stream, TensorData

PARTS = {"encoder", "mid_block", "decoder", "time", "label"}


def method(gan: GAN | None = None, **options) -> DMD2:
    torch.manual_seed(1)
    return DMD2(small_generator(), streams=small_streams(), gan=gan or GAN(), **options)


def frozen_but(method: DMD2, *movers: str) -> DMD2:
    """As the engine has it in a turn that moves these players."""
    for name, player in method.players.items():
        player.requires_grad_(name in movers)
    return method


# --- gradients


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_students_term_reaches_the_student_through_the_judge(features: str):
    m = frozen_but(moved_apart(method(GAN(features=features))), "student")
    terms, _ = m.student_loss(prepared(m))
    assert reached(terms["gan"], m.players["student"]) == PARTS
    sum(terms.values()).backward()
    others = [m.players["fake_score"], m.players["discriminator"], m.frozen["teacher"]]
    assert all(p.grad is None for other in others for p in other.parameters())


def test_the_critics_term_teaches_the_critic_up_to_the_tap_and_the_head():
    m = moved_apart(method())
    batch = prepared(m, ("critic",))
    terms, _ = m.critic_loss(batch)
    assert reached(terms["gan"], m.players["fake_score"]) == {"encoder", "mid_block", "time", "label"}
    assert reached(terms["denoising"], m.players["fake_score"]) == PARTS
    assert len(reached(terms["gan"], m.players["discriminator"])) == 1
    assert not reached(terms["denoising"], m.players["discriminator"])
    assert not reached(terms["gan"], m.players["student"])
    assert not batch["images"].requires_grad


def test_on_the_teachers_features_the_head_learns_alone():
    m = moved_apart(method(GAN(features="teacher")))
    terms, _ = m.critic_loss(prepared(m, ("critic",)))
    assert not reached(terms["gan"], m.players["fake_score"])
    assert reached(terms["gan"], m.players["discriminator"]) == {"heads"}


def test_on_the_engine_each_turn_moves_its_players_alone(tmp_path: Path):
    seen = []

    class Spy(DMD2):
        def student_loss(self, batch):
            seen.append({name: weights(player) for name, player in self.players.items()})
            return super().student_loss(batch)

        def critic_loss(self, batch):
            seen.append({name: weights(player) for name, player in self.players.items()})
            return super().critic_loss(batch)

    m = Spy(small_generator(), streams=small_streams(), gan=GAN(generator_weight=1.0), student_every=2)
    before = weights(m.frozen["teacher"])
    play(m, tmp_path, steps=2)
    (first, after_student, after_critic) = seen
    moved = [
        {name for name in a if not torch.equal(a[name], b[name])}
        for a, b in ((first, after_student), (after_student, after_critic))
    ]
    assert moved == [{"student"}, {"fake_score", "discriminator"}]
    assert torch.equal(weights(m.frozen["teacher"]), before)


def test_real_logits_are_compared_with_and_not_learnt_from_in_the_students_turn():
    m, seen = method(GAN(kind="relativistic")), []
    m.players["discriminator"].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    m.student_loss(prepared(m))
    assert seen == [True, False]


# --- what is judged


@pytest.mark.parametrize("kind", ["softplus", "hinge", "relativistic"])
@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_terms_by_hand(kind: str, features: str):
    gan = GAN(features=features, kind=kind, generator_weight=0.3, critic_weight=0.7)
    m = moved_apart(method(gan))
    batch = prepared(m)
    judge = m.players["fake_score"] if features == "fake_score" else m.frozen["teacher"].denoiser

    def logits(x0: torch.Tensor, noise: dict, labels: torch.Tensor) -> torch.Tensor:
        x_t = x0 + noise["t"].view(-1, 1, 1, 1) * noise["noise"]
        _, (mid,) = judge.features(x_t, noise["t"], labels, taps=["mid_block"])
        return m.players["discriminator"].heads[0](mid).flatten(1)

    data, real = batch["train"], batch["judged_real"]
    _, real_mid = judge.features(real["x_t"], real["t"], data["label"], taps=["mid_block"])
    on_real = m.players["discriminator"].heads[0](real_mid[0]).flatten(1)
    terms, carry = m.student_loss(batch)
    fake = logits(carry["images"], batch["judged_by_student"], batch["condition"])
    torch.testing.assert_close(terms["gan"], 0.3 * gan_generator_loss(fake, on_real, kind=kind))
    terms, _ = m.critic_loss(batch | {"images": carry["images"].detach()})
    fake = logits(carry["images"], batch["judged_by_critic"], batch["condition"])
    torch.testing.assert_close(terms["gan"], 0.7 * gan_discriminator_loss(on_real, fake, kind=kind))


def test_real_samples_are_the_datas_codes_with_their_own_labels():
    m = method()
    batch = prepared(m)
    real = batch["judged_real"]
    noise = (real["x_t"] - (2 * batch["train"]["image"] - 1)) / real["t"].view(-1, 1, 1, 1)
    assert noise.std() == pytest.approx(1.0, abs=0.2)
    assert torch.equal(real["condition"], batch["train"]["label"])
    assert not torch.equal(real["condition"], batch["condition"])


@pytest.mark.parametrize("process", [EDMProcess(), FlowProcess(shift=3.0), VPProcess.from_betas()], ids=repr)
def test_every_sample_has_its_own_noise_at_its_own_level_of_the_whole_range(process: Process):
    rows = 2000
    m = DMD2(small_generator(process), streams=small_streams(rows), gan=GAN())
    batch = prepared(m, rows=rows)
    levels = [batch[name]["t"].double() for name in ("judged_real", "judged_by_student", "judged_by_critic", "critic")]
    start, end = (m.process.min_t, m.process.max_t)
    for t in levels:
        assert t.min() < start + 0.01 * (end - start)
        assert t.max() > end - 0.01 * (end - start)
    ranks = torch.stack([t.argsort().argsort().double() for t in levels])
    assert (torch.corrcoef(ranks) - torch.eye(4)).abs().max() < 0.1
    noises = torch.stack(
        [batch[name]["noise"].flatten() for name in ("judged_by_student", "judged_by_critic", "score")]
    )
    assert (torch.corrcoef(noises) - torch.eye(3)).abs().max() < 0.05


def test_the_times_of_what_is_judged_can_be_set():
    m = method(GAN(times=TimeLaw("uniform", low=3.0, high=4.0)))
    batch = prepared(m)
    assert all(
        3 <= batch[name]["t"].min() <= batch[name]["t"].max() <= 4 for name in ("judged_real", "judged_by_critic")
    )


@pytest.mark.parametrize("process", [EDMProcess(), FlowProcess(), VPProcess.from_betas()], ids=repr)
def test_r1_compares_logits_at_one_noise_level(process: Process):
    """A peer perturbs the clean sample and feeds it at the noised one's time."""
    m = DMD2(small_generator(process), streams=small_streams(), gan=GAN(r1=2.0))
    batch = prepared(m)
    real, beside = batch["judged_real"], batch["judged_beside"]
    assert torch.equal(real["t"], beside["t"])
    step = (beside["x_t"] - real["x_t"]) / process.sigma(real["t"]).view(-1, 1, 1, 1)
    assert step.std() == pytest.approx(0.1, rel=0.15)
    terms, _ = m.critic_loss(batch | {"images": torch.zeros(ROWS, *SHAPE, dtype=torch.float64)})
    expected = 2.0 * (m._logits(**beside) - m._logits(**real)).square().mean()
    torch.testing.assert_close(terms["r1"], expected)
    assert "encoder" in reached(terms["r1"], m.players["fake_score"])


def test_r1_is_the_squared_gradient_along_the_noise():
    m = method(GAN(r1=1.0, times=TimeLaw("uniform", low=0.4, high=0.6)))
    batch = prepared(m)
    real = batch["judged_real"]
    x_t = real["x_t"].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(m._logits(x_t, real["t"], real["condition"]).sum(), x_t)
    along = (gradient * (batch["judged_beside"]["x_t"] - real["x_t"])).flatten(1).sum(1)
    terms, _ = m.critic_loss(batch | {"images": torch.zeros_like(x_t)})
    torch.testing.assert_close(terms["r1"], along.square().mean(), rtol=0.25, atol=0)


def test_data_are_read_for_the_adversarial_term_alone():
    assert not DMD2(small_generator(), streams=small_streams()).streams
    assert list(method().streams) == ["train"]
    with pytest.raises(ValueError, match="name the data"):
        DMD2(small_generator(), gan=GAN())


def test_images_of_another_size_are_refused_with_the_size_they_need():
    streams = {"train": Stream(TensorData({"image": torch.rand(8, 3, 8, 8), "label": torch.arange(8) % 3}), ROWS)}
    m = DMD2(small_generator(), streams=streams, gan=GAN())
    with pytest.raises(ValueError, match=r"\[3, 8, 8\].*channels, \[1, 4, 4\]"):
        prepared(m)


@pytest.mark.parametrize(("kind", "encoded"), [("softplus", 0), ("relativistic", 1)])
def test_images_are_encoded_once_and_only_where_a_turn_compares_with_them(kind: str, encoded: int):
    m, calls = method(GAN(kind=kind), alternate=True), []
    plain = m.teacher.codec.encode
    m.teacher.codec.encode = lambda images: calls.append(torch.is_grad_enabled()) or plain(images)
    prepared(m, ("student",))
    assert calls == [False] * encoded
    prepared(m, ("critic",))
    assert calls == [False] * (encoded + 1)


def test_codes_that_the_data_hold_are_not_encoded_again():
    codes = torch.randn(20, *SHAPE, dtype=torch.float64)
    streams = {"train": Stream(TensorData({"code": codes, "label": torch.arange(20) % CLASSES}), ROWS)}
    m = DMD2(small_generator(), streams=streams, gan=GAN(times=TimeLaw("uniform", low=0.01, high=0.01)))
    batch = prepared(m)
    torch.testing.assert_close(batch["judged_real"]["x_t"], codes[batch["train"]["index"]], rtol=0, atol=0.05)


def test_a_frozen_teacher_in_half_precision_can_judge():
    teacher = small_generator()
    teacher.denoiser.bfloat16()
    m = DMD2(
        teacher, student=small_generator(), fake_score=small_generator(), streams=small_streams(), gan=GAN("teacher")
    )
    batch = prepared(m)
    terms, _ = m.student_loss(batch)
    assert math.isfinite(terms["gan"].item())
    assert reached(terms["gan"], m.players["student"]) == PARTS


def test_a_video_is_judged_frame_by_frame():
    shape, rows = (3, 1, 4, 4), 4
    m = DMD2(
        small_generator(FlowProcess(), "velocity", shape=shape), gan=GAN(), streams={"train": Videos()}, frame_block=2
    )
    batch = prepared(m, rows=rows)
    assert batch["score"]["t"].shape == (rows, 3)
    assert torch.equal(batch["score"]["t"][:, 0], batch["score"]["t"][:, 1])
    assert not torch.equal(batch["score"]["t"][:, 0], batch["score"]["t"][:, 2])
    assert m._logits(**batch["judged_real"]).shape == (rows, 3)
    terms, carry = m.student_loss(batch)
    critic, _ = m.critic_loss(batch | {"images": carry["images"].detach()})
    assert carry["images"].shape == (rows, *shape)
    assert all(math.isfinite(value.item()) for value in (*terms.values(), *critic.values()))


def test_a_student_of_few_steps_learns_videos_with_times_by_frame(tmp_path: Path):
    """And real samples are fewer than generated ones here."""
    teacher = small_generator(FlowProcess(), "velocity", shape=(3, 1, 4, 4))
    m = DMD2(teacher, gan=GAN(), streams={"train": Videos()}, frame_block=1, student_steps=3, student_every=2)
    result = play(m, tmp_path, 6)
    assert result.reason == "finished"
    samples = m.generator().sample(torch.randn(2, 3, 1, 4, 4).double(), torch.tensor([0, 1]))
    assert samples.shape == (2, 3, 1, 4, 4)


class Videos:
    batch_size = 4

    def open(self, start, rows, seed, device=None):
        while True:
            yield [
                {"image": torch.rand(high - low, 3, 1, 4, 4).double(), "label": torch.zeros(high - low).long()}
                for low, high in rows
            ]


NETWORKS = {
    "UNet2D": ({"block_out_channels": (8, 16), "norm_num_groups": 4}, "mid_block"),
    "DiT": ({"num_layers": 2, "attention_head_dim": 6, "process": FlowProcess()}, "transformer_blocks.1"),
}


def of_diffusers(name: str) -> DMD2:
    from diffusion import models

    own, tap = NETWORKS[name]
    streams = {"train": Stream(small_images(size=8), ROWS)}
    return DMD2(getattr(models, name)((1, 8, 8), num_classes=CLASSES, **own), streams=streams, gan=GAN(taps=[tap]))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers_are_judged_by_their_blocks(name: str, tmp_path: Path):
    m = of_diffusers(name)
    assert m.players["discriminator"].heads[0][0].kernel_size == (4, 4), "one kernel over the whole 4x4 map"
    play(m, tmp_path, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tap_that_is_not_there_is_refused_with_one_that_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own, right = NETWORKS[name]
    monkeypatch.setitem(NETWORKS, name, (own, "middle"))
    with pytest.raises(ValueError, match=rf"method\.gan\.taps.*take '[\w.]*\.{right}', its middle block") as refused:
        of_diffusers(name)
    named = str(refused.value).partition("take '")[2].partition("'")[0]
    monkeypatch.setitem(NETWORKS, name, (own, named))
    play(of_diffusers(name), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_with_networks_of_diffusers_each_turn_is_one_graph(name: str, tmp_path: Path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    play(of_diffusers(name), tmp_path, 6, proof_window=0, compile=True, compile_backend="eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


# --- the engine's promises


def test_each_turn_is_one_graph(tmp_path: Path):
    each_turn_is_one_graph(lambda: method(GAN(kind="relativistic", r1=1.0), student_every=2), tmp_path)


def test_micro_batches_see_the_same_noise(tmp_path: Path):
    whole, halves = (method(GAN(kind="hinge", r1=1.0)) for _ in range(2))
    play(whole, tmp_path / "1", noise_block=4)
    play(halves, tmp_path / "2", noise_block=4, grad_accum_steps=2)
    torch.testing.assert_close(weights(halves.players), weights(whole.players), rtol=1e-9, atol=1e-10)
