"""Who plays when, and what it costs; critics of their own kind; what a student hands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import SHAPE, SmallUNet, play, prepared, small_denoiser, small_draw, small_generator, small_streams, weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion.critics import GAN
from diffusion.denoiser import Denoiser, EDMPreconditioner
from diffusion.generator import Generator
from diffusion.methods.dmd2 import DMD2
from diffusion.process import EDMProcess, FlowProcess, VPProcess
from visiondistill.engine import Optim, Run, Stage, train


def played(folder: Path, steps: int, **options) -> list[tuple[str, int]]:
    """(turn, step) in order of play."""
    order = []

    class Spy(DMD2):
        def prepare(self, batch, draw, due):
            self.now = draw.step
            return super().prepare(batch, draw, due)

        def student_loss(self, batch):
            order.append(("student", self.now))
            return super().student_loss(batch)

        def critic_loss(self, batch):
            order.append(("critic", self.now))
            return super().critic_loss(batch)

    play(Spy(small_generator(), **options), folder, steps, proof_window=0)
    return order


def test_the_critic_plays_in_every_step_and_the_student_in_every_third(tmp_path: Path):
    order = played(tmp_path, 7, student_every=3)
    assert [step for turn, step in order if turn == "critic"] == list(range(7))
    assert [step for turn, step in order if turn == "student"] == [0, 3, 6]


def test_alternating_one_student_turn_follows_so_many_of_the_critic(tmp_path: Path):
    order = played(tmp_path, 7, student_every=3, alternate=True)
    assert order == [(turn, step) for step, turn in enumerate(["critic", "critic", "student"] * 2 + ["critic"])]


@pytest.mark.parametrize("cycle", [2, 3, 5])
def test_the_critics_turn_counts_its_plays(cycle: int):
    (_, critic) = DMD2(small_generator(), student_every=cycle, alternate=True).turns()
    assert [critic.count(step) for step in range(20)] == [sum(map(critic.due, range(step))) for step in range(20)]


def test_alternating_runs_resume_in_mid_cycle(tmp_path: Path):
    options = {"student_every": 4, "alternate": True, "gan": GAN(kind="relativistic"), "streams": small_streams()}

    def method() -> DMD2:
        torch.manual_seed(0)
        return DMD2(small_generator(), **options)

    optim = {"default": Optim("adam", lr=1e-2, schedule="cosine")}
    run = {"batch_size": 8, "checkpoint_every": 5, "keep": 10, "progress": False, "device": "cpu", "log_every": 1}
    whole, again = method(), method()
    train([Stage(whole, 10, optim)], Run(str(tmp_path / "whole"), **run))
    middle = str(tmp_path / "whole" / "checkpoints" / "step_000000005")
    train([Stage(again, 10, optim)], Run(str(tmp_path / "again"), resume=middle, **run))
    assert torch.equal(weights(again.players), weights(whole.players))


# --- what a step costs, in forward passes F of one network (a backward pass is two)


class Deep(nn.Module):
    """Layers enough that the first one's missing gradient of its input hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(1 if i == 0 else 8, 1 if i == 15 else 8, 3, 1, 1) for i in range(16)))

    def forward(self, x, t, condition=None):
        return self.layers(x)


@pytest.fixture(scope="module")
def costs() -> dict[str, float]:
    teacher = Generator(Denoiser(Deep().double(), EDMProcess(), "x0"), SHAPE)
    method = DMD2(teacher, student_every=5)

    def flops(*due: str) -> float:
        with FlopCounterMode(display=False) as counter:
            batch = prepared(method, due)
            for name in ("student", "critic"):
                for role, player in method.players.items():
                    player.requires_grad_(role == ("student" if name == "student" else "fake_score"))
                if name in due:
                    terms, carry = (method.student_loss if name == "student" else method.critic_loss)(batch)
                    sum(terms.values()).backward()
                    batch |= {key: value.detach() for key, value in carry.items()}
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.denoiser(torch.zeros(8, *SHAPE, dtype=torch.float64), 1.0)
    forward = counter.get_total_flops()
    steps = {"critic": flops("critic"), "student": flops("student"), "both": flops("student", "critic")}
    return {name: value / forward for name, value in steps.items()}


def test_a_critics_turn_costs_four_passes_and_a_students_five(costs: dict[str, float]):
    """Critic: images 1, its own pass 1 and back 2. Student: its pass and back 3, both scores 2."""
    assert costs["critic"] == pytest.approx(4, abs=0.15)
    assert costs["student"] == pytest.approx(5, abs=0.15)


def test_shared_images_make_it_4_8_passes_a_step(costs: dict[str, float]):
    assert costs["both"] == pytest.approx(costs["critic"] + costs["student"] - 1, abs=1e-9)
    assert (costs["both"] + 4 * costs["critic"]) / 5 == pytest.approx(4.8, abs=0.15)


# --- networks of other kinds, and the generators that come out


def test_a_critic_may_have_an_architecture_of_its_own(tmp_path: Path):
    critic = Denoiser(SmallUNet(width=4).double(), EDMProcess(), "x0")
    method = DMD2(small_generator(), fake_score=critic, streams=small_streams(), gan=GAN())
    assert method.players["fake_score"] is critic
    assert method.players["discriminator"].heads[0][0].in_channels == 4
    play(method, tmp_path, 3)


def test_a_student_may_be_another_generator_and_hands_itself_on():
    student = small_generator(seed=3, steps=30, guidance_scale=2.0)
    method = DMD2(small_generator(guidance_scale=3.0), student=student, student_steps=2)
    assert method.guidance_scale == 3.0, "the teacher is matched as it is sampled"
    handed_over = method.handover()
    assert handed_over.denoiser is student.denoiser is method.product()
    assert (handed_over.steps, handed_over.sampler, handed_over.guidance_scale) == (2, "student", 1.0)
    average = small_denoiser(seed=5)
    assert method.generator(average).denoiser is average
    assert handed_over.codec is method.frozen["teacher"].codec


@pytest.mark.parametrize("process", [EDMProcess(), FlowProcess(shift=3.0), VPProcess.from_betas()], ids=repr)
@pytest.mark.parametrize("steps", [1, 3])
def test_it_samples_at_the_times_it_was_trained_at(process, steps: int):
    """A peer's one-step list starts at 79.56 where training has 80."""
    method = DMD2(small_generator(process), student_steps=steps)
    assert method.generator().times().tolist() == method.times
    assert method.times[0] == process.max_t
    trained = {prepared(method, ("critic",), step)["input"]["t"][0].item() for step in range(30)}
    assert sorted(trained) == pytest.approx(sorted(method.times[:-1]), rel=1e-6)


@pytest.mark.parametrize("max_t", [1.0, 0.7])
def test_the_first_latent_has_the_scale_of_its_time(max_t: float):
    """A peer scales it wrongly where the path does not begin at its end."""
    method = DMD2(small_generator(FlowProcess(max_t=max_t)))
    batch = prepared(method, rows=400)
    assert batch["input"]["x_t"].std() == pytest.approx(max_t, rel=0.05)
    noise = torch.randn(4, *SHAPE, dtype=torch.float64)
    generator, seen = method.generator(), []
    generator.denoiser.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    generator.sample(noise, torch.zeros(4).long())
    torch.testing.assert_close(seen[0], max_t * noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_every": 1, "alternate": True}, "at least 2"),
        ({"fake_score": small_denoiser(FlowProcess(), "velocity")}, "fake_score runs on FlowProcess"),
        ({"fake_score": small_denoiser(EDMProcess(sigma_max=60.0))}, "one noise path"),
        ({"student": small_generator(shape=(1, 8, 8))}, r"\[1, 8, 8\]"),
        ({"frame_block": 2}, "videos"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DMD2(small_generator(), **options)


# --- training and sampling walk one path


def test_students_of_the_boundary_form_train_on_what_they_will_sample():
    """At noise levels near sigma_min, so that leaving it out shows."""
    torch.manual_seed(0)
    process = EDMProcess(sigma_min=0.5, sigma_max=2.0)
    denoiser = Denoiser(EDMPreconditioner(SmallUNet().double(), sigma_min=0.5), process, "x0")
    m = DMD2(Generator(denoiser, SHAPE), student_steps=3)
    exits, seen = set(), []
    watched = m.generator(Denoiser(Watched(m.players["student"].network, seen), process, "x0"))
    for step in range(12):
        draw = small_draw(step)
        x_t, t = m._student_input(draw, None)
        at = m.times.index(t[0].item())
        noise = draw.normal("input/noise", *SHAPE)
        first = noise if at == 0 else draw.normal("input/start", *SHAPE)
        between = [draw.normal(f"input/renoise_{i}", *SHAPE) for i in range(max(at - 1, 0))]
        seen.clear()
        watched.sample(first, noises=[*between, noise, noise][:2])
        assert torch.equal(seen[at], x_t)
        exits.add(at)
    assert exits == {0, 1, 2}


class Watched(EDMPreconditioner):
    """A preconditioned network whose inputs are kept."""

    def __init__(self, network: EDMPreconditioner, seen: list[torch.Tensor]) -> None:
        super().__init__(network.network, network.sigma_data, network.sigma_min)
        self.seen = seen

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: object = None) -> torch.Tensor:
        self.seen.append(x_t)
        return super().forward(x_t, t, condition)
