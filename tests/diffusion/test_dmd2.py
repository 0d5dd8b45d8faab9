"""DMD2 as a method: gradient routing, its start, which images whom, times, guidance, and the engine's promises."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import small
import torch
import torch._dynamo
from torch import nn

from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser, EDMPreconditioner
from diffusion.generator import Generator
from diffusion.losses import denoising_loss, dmd_loss, edm_loss_weight
from diffusion.methods.dmd2 import DMD2
from diffusion.process import EDMProcess, FlowProcess, Process, TimeLaw, TrigProcess, VPProcess, karras_sigmas
from visiondistill.engine import Draw, Optim, Run, Stage, train

SHAPE = (3, 2)
ROWS = 8


class Network(nn.Module):
    """Per position; conditioned on time and, if given, a label."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(2, 16), nn.Linear(16, 2)
        self.time, self.label = nn.Linear(1, 16), nn.Embedding(classes + 1, 16)

    def forward(self, x, t, condition=None):
        t = t.to(self.time.weight.dtype).reshape(-1, 1, 1)
        t = t / (1 + t.abs())
        hidden = self.inward(x) + self.time(t)
        if condition is not None:
            hidden = hidden + self.label(condition).unsqueeze(1)
        return self.outward(torch.tanh(hidden))


def denoiser(process: Process | None = None, kind: str = "x0", seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    if process is None:
        return Denoiser(EDMPreconditioner(Network()), EDMProcess(), "x0")
    return Denoiser(Network(), process, kind)


def teacher(process: Process | None = None, kind: str = "x0", classes: int | None = None, seed: int = 0) -> Generator:
    conditions = None if classes is None else ClassLabels(classes)
    return Generator(denoiser(process, kind, seed), SHAPE, conditions=conditions)


def draw(step: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Draw:
    return Draw(0, step, {"": (0, rows)}, rows, torch.device("cpu"), dtype)


def prepared(method: DMD2, due: tuple[str, ...] = ("student", "critic"), **kw):
    with torch.no_grad():
        return method.prepare({}, draw(**kw), frozenset(due))


def settings(folder: Path, **kw) -> Run:
    return Run(
        **{
            "output_dir": str(folder),
            "batch_size": ROWS,
            "device": "cpu",
            "progress": False,
            "proof_window": 0,
            "log_every": 1,
            "checkpoint_every": 1000,
        }
        | kw
    )


OPTIM = {"student": Optim("adam", lr=1e-2), "fake_score": Optim("adam", lr=1e-2)}


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def moved_apart(method: DMD2) -> DMD2:
    """A method whose critic is no longer the teacher."""
    with torch.no_grad():
        for p in method.players["fake_score"].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return method


# --- the start


def test_student_and_critic_start_as_trainable_copies_even_of_a_frozen_teacher():
    real = denoiser().requires_grad_(False)
    method = DMD2(Generator(real, SHAPE))
    for player in method.players.values():
        assert torch.equal(weights(player), weights(real))
        assert all(p.requires_grad for p in player.parameters())
        assert not {id(p) for p in player.parameters()} & {id(p) for p in real.parameters()}
    assert method.product() is method.players["student"]


def test_the_first_image_is_the_teachers_one_step_denoise():
    method = DMD2(teacher())
    images = prepared(method, ("critic",))["images"]
    noise = draw().normal("input/noise", *SHAPE)
    assert torch.equal(images, denoiser()(80 * noise, 80.0).x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_exactly_zero_while_the_critic_is_the_teacher(dtype):
    method = DMD2(teacher().to(dtype))
    terms, _ = method.student_loss(prepared(method, dtype=dtype))
    terms["dmd"].backward()
    assert terms["dmd"].item() == 0
    assert all(p.grad.abs().max() == 0 for p in method.players["student"].parameters() if p.grad is not None)


def test_with_guidance_of_the_real_score_alone_it_is_not_zero_at_the_start():
    method = DMD2(teacher(classes=4), guidance_scale=3.0)
    loss = method.student_loss(prepared(method))[0]["dmd"]
    assert loss > 1e-4
    unguided = DMD2(teacher(classes=4), guidance_scale=1.0)
    assert unguided.student_loss(prepared(unguided))[0]["dmd"] == 0


# --- the turns' losses


def test_student_loss_is_dmd_at_the_students_noised_images():
    method = moved_apart(DMD2(teacher()))
    batch = prepared(method)
    terms, carry = method.student_loss(batch)
    x_t = carry["images"] + batch["score"]["t"].float().reshape(-1, 1, 1) * batch["score"]["noise"]
    t = batch["score"]["t"]
    real, fake = method.frozen["teacher"].denoiser(x_t, t).x0, method.players["fake_score"](x_t, t).x0
    expected = dmd_loss(carry["images"], real, fake)
    torch.testing.assert_close(terms["dmd"], expected)
    assert expected > 0


def test_both_scores_are_read_without_a_graph():
    """The loss detaches them anyway; a graph would cost the memory of two more networks."""
    method = DMD2(teacher())
    seen = []
    for network in (method.frozen["teacher"].denoiser, method.players["fake_score"]):
        network.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    method.student_loss(prepared(method))
    assert seen == [False, False]


def test_the_normaliser_sees_the_guided_teacher():
    method = moved_apart(DMD2(teacher(classes=4), guidance_scale=4.0))
    batch = prepared(method)
    terms, carry = method.student_loss(batch)
    images, t, c = carry["images"], batch["score"]["t"], batch["condition"]
    x_t = method.process.add_noise(images, **batch["score"])
    real, null = method.frozen["teacher"].denoiser, torch.full_like(c, 4)
    guided = real(x_t, t, null).x0 + 4 * (real(x_t, t, c).x0 - real(x_t, t, null).x0)
    torch.testing.assert_close(terms["dmd"], dmd_loss(images, guided, method.players["fake_score"](x_t, t, c).x0))


@pytest.mark.parametrize("frame_block", [None, 1])
def test_the_real_score_alone_is_guided_in_the_interval_and_rescaled(frame_block):
    how = {"guidance_scale": 4.0, "guidance_interval": (0.1, 2.0), "guidance_rescale": 0.7}
    videos = small.small_generator(shape=(2, 1, 4, 4), guidance_scale=2.0)
    method = moved_apart(DMD2(videos, frame_block=frame_block, **how))
    batch = small.prepared(method)
    terms, carry = method.student_loss(batch)
    images, t, c = carry["images"], batch["score"]["t"], batch["condition"]
    assert 0 < ((t >= 0.1) & (t <= 2.0)).sum() < t.numel()
    x_t = method.process.add_noise(images, **batch["score"])
    real, axes = method.frozen["teacher"].denoiser, tuple(range(t.ndim, 5))
    cond, null = real(x_t, t, c).x0, real(x_t, t, torch.full_like(c, small.CLASSES)).x0
    guided = null + 4 * (cond - null)
    guided = guided * (0.3 + 0.7 * cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    acts = ((t >= 0.1) & (t <= 2.0)).reshape(*t.shape, *(1,) * len(axes))
    expected = torch.where(acts, guided, cond)
    fake = method.players["fake_score"](x_t, t, c).x0
    torch.testing.assert_close(terms["dmd"], dmd_loss(images, expected, fake))
    for other in (guided, cond):
        assert not torch.allclose(terms["dmd"], dmd_loss(images, other, fake), rtol=1e-3)


def test_the_real_score_is_guided_as_the_teacher_samples_unless_told():
    how = {"guidance_scale": 3.0, "guidance_interval": (0.5, 20.0), "guidance_rescale": 0.4}
    made = Generator(denoiser(), SHAPE, conditions=ClassLabels(4), **how)
    assert DMD2(made).guidance == how
    assert DMD2(made, guidance_scale=1.0).guidance == how | {"guidance_scale": 1.0}
    assert DMD2(made, guidance_rescale=0.0).guidance == how | {"guidance_rescale": 0.0}
    assert DMD2(made, guidance_interval=(0.002, 80.0)).guidance == how | {"guidance_interval": (0.002, 80.0)}
    plain = {"guidance_scale": 1.0, "guidance_interval": None, "guidance_rescale": 0.0}
    assert DMD2(made).generator().guidance == plain


def test_critic_loss_is_edms_weighted_denoising_of_the_images():
    method = DMD2(teacher())
    batch = prepared(method, ("critic",))
    t = batch["critic"]["t"]
    x_t = method.process.add_noise(batch["images"], **batch["critic"])
    expected = denoising_loss(method.players["fake_score"](x_t, t).x0, batch["images"], weight=edm_loss_weight(t))
    torch.testing.assert_close(method.critic_loss(batch)[0]["denoising"], expected)


@pytest.mark.parametrize("space", ["x0", "eps", "v", "velocity"])
def test_critic_spaces_are_one_error_under_known_weights(space):
    """card: |x0 error|^2 = sigma^2/alpha^2 |eps error|^2 = sigma^2 |velocity error|^2 on the linear path."""
    method = DMD2(teacher(FlowProcess(), "velocity"), critic_space=space, sigma_data=None)
    batch = prepared(method, ("critic",), dtype=torch.float32)
    sample = method.process.noised(batch["images"], **batch["critic"])
    error = (method.players["fake_score"](sample.x_t, sample.t).x0 - sample.x0).double()
    a, s = ((f(sample.t)).reshape(-1, 1, 1) for f in (method.process.alpha, method.process.sigma))
    scale = {"x0": 1, "eps": a / s, "v": (a**2 + s**2) / s, "velocity": 1 / s}[space]
    got = method.critic_loss(batch)[0]["denoising"].double()
    torch.testing.assert_close(got, (scale * error).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "space"), [("eps", "eps"), ("v", "v"), ("x0", "x0"), ("score", "eps")])
def test_the_critics_error_is_taken_of_what_it_predicts(kind, space):
    method = DMD2(teacher(VPProcess.from_betas(), "v"), fake_score=denoiser(VPProcess.from_betas(), kind))
    assert method.critic_space == space
    terms, _ = method.critic_loss(prepared(method, ("critic",)))
    assert terms["denoising"].isfinite()


def test_gradients_reach_exactly_the_mover():
    """Every parameter requires a gradient here, so nothing but the losses decides."""
    method = moved_apart(DMD2(teacher()))
    method.requires_grad_(True)
    parts = {**method.players, **method.frozen}
    batch = prepared(method)
    student, carry = method.student_loss(batch)
    critic, _ = method.critic_loss(batch | {"images": carry["images"].detach()})
    for terms, mover in ((student, "student"), (critic, "fake_score")):
        method.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        for name, part in parts.items():
            reached = any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
            assert reached == (name == mover), name


def test_the_critics_batch_looks_alike_whether_the_student_played_or_not():
    method = DMD2(teacher(classes=4))
    batch = prepared(method)
    played = batch | method.student_loss(batch)[1]
    idle = prepared(method, ("critic",))
    assert list(played) == list(idle)
    for name in ("images", "condition", "null_condition"):
        assert played[name].shape == idle[name].shape
        assert played[name].dtype == idle[name].dtype
    torch.testing.assert_close(played["images"].detach(), idle["images"], rtol=0, atol=0)


# --- noise levels and the student's input


@pytest.mark.parametrize("process", [VPProcess.from_betas(), EDMProcess(), FlowProcess(shift=5.0)], ids=repr)
def test_scores_are_compared_on_2_to_98_percent_and_the_critic_learns_everywhere(process):
    method = DMD2(teacher(process))
    batch = prepared(method, rows=20_000)
    score, critic = batch["score"]["t"].double(), batch["critic"]["t"].double()
    table = karras_sigmas(1000)
    low, high, first, last = {
        VPProcess: (20, 980, 0, 999),
        EDMProcess: (table[20], table[980], 0.002, 80.0),
        FlowProcess: (0.02, 0.98, 0.0, 1.0),
    }[type(process)]
    assert score.min() >= float(low) * 0.999
    assert score.max() <= float(high) * 1.001
    span = last - first
    assert critic.min() < first + 0.01 * span
    assert critic.max() > last - 0.01 * span
    assert not torch.equal(score, critic)


def test_time_laws_can_be_set():
    law = TimeLaw("lognormal", mean=-1.2, std=1.2, low=0.01, high=1.0)
    batch = prepared(DMD2(teacher(), score_times=law, critic_times=TimeLaw("uniform", low=5.0, high=6.0)))
    assert batch["score"]["t"].max() <= 1.0
    assert batch["critic"]["t"].min() >= 5.0


def test_noise_of_the_turns_is_independent():
    batch = prepared(DMD2(teacher()), rows=4000)
    noises = torch.stack([batch["score"]["noise"], batch["critic"]["noise"], batch["input"]["x_t"] / 80]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(3)).abs().max() < 0.05


def test_a_few_step_student_trains_on_inputs_that_it_made_itself():
    method = DMD2(teacher(VPProcess.from_betas(), "eps"), student_steps=4)
    assert method.times == [999, 749, 499, 249, -1]
    calls = []
    method.generate = lambda x_t, t, condition=None: calls.append((x_t, t, torch.is_grad_enabled())) or x_t / 2
    exits = set()
    for step in range(40):
        calls.clear()
        batch = prepared(method, step=step)
        (exit_time,) = set(batch["input"]["t"].tolist())
        exits.add(exit_time)
        before = [999, 749, 499, 249][: [999, 749, 499, 249].index(exit_time)]
        assert [t[0].item() for _, t, _ in calls] == before, "simulated through all earlier steps"
        assert not any(graph for *_, graph in calls)
        outer = draw(step).normal("input/noise", *SHAPE)
        if exit_time == 999:
            assert torch.equal(batch["input"]["x_t"], outer), "pure noise"
        else:
            assert not torch.equal(calls[0][0], outer), "the last noise must be independent of all before"
    assert exits == {999, 749, 499, 249}


# --- on the engine


def test_the_student_plays_every_fifth_step_and_the_critic_always_on_images_made_before(tmp_path):
    seen = []

    class Spy(DMD2):
        def student_loss(self, batch):
            seen.append(("student", weights(self.players["student"])))
            return super().student_loss(batch)

        def critic_loss(self, batch):
            seen.append(("critic", weights(self.players["student"]), batch["images"].clone()))
            return super().critic_loss(batch)

    real = denoiser()
    method = Spy(Generator(real, SHAPE))
    before = weights(real)
    train([Stage(method, steps=11, optim=OPTIM)], settings(tmp_path))
    order = [entry[0] for entry in seen]
    assert order == (["student", "critic"] + ["critic"] * 4) * 2 + ["student", "critic"]
    student = copy.deepcopy(method.players["student"])
    step = -1
    for index, entry in enumerate(seen):
        if entry[0] == "student":
            continue
        step += 1
        # The weights with which this step's images were made: those before its student update.
        made_with = seen[index - 1][1] if seen[index - 1][0] == "student" else entry[1]
        nn.utils.vector_to_parameters(made_with.float(), student.parameters())
        x = 80 * draw(step).normal("input/noise", *SHAPE)
        torch.testing.assert_close(entry[2], student(x, 80.0).x0.detach(), rtol=1e-4, atol=1e-5)
    students = [entry[1] for entry in seen]
    assert torch.equal(students[0], students[1]), "a zero gradient moved the student"
    assert not torch.equal(students[6], students[7]), "the second student update did not happen"
    assert torch.equal(students[1], students[5])
    assert torch.equal(weights(real), before)


def test_each_turn_is_one_graph_from_first_to_last_step(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (DMD2(teacher().double(), student_every=2) for _ in range(2))
    train([Stage(eager, steps=7, optim=OPTIM)], settings(tmp_path / "eager"))
    train([Stage(compiled, steps=7, optim=OPTIM)], settings(tmp_path / "one", compile=True, compile_backend="eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()


def test_micro_batches_see_the_same_noise(tmp_path):
    whole, halves = (DMD2(teacher().double()) for _ in range(2))
    train([Stage(whole, steps=7, optim=OPTIM)], settings(tmp_path / "1", noise_block=4))
    train([Stage(halves, steps=7, optim=OPTIM)], settings(tmp_path / "2", noise_block=4, grad_accum_steps=2))
    torch.testing.assert_close(weights(halves), weights(whole), rtol=1e-9, atol=1e-10)


def test_a_run_resumed_inside_the_cycle_continues_identically(tmp_path):
    run = {"checkpoint_every": 3, "keep": 10}
    whole, again = DMD2(teacher()), DMD2(teacher())
    train([Stage(whole, steps=8, optim=OPTIM)], settings(tmp_path / "whole", **run))
    middle = tmp_path / "whole" / "checkpoints" / "step_000000003"
    train([Stage(again, steps=8, optim=OPTIM)], settings(tmp_path / "again", resume=str(middle), **run))
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("process", "kind", "space"),
    [
        (EDMProcess(), "x0", "x0"),
        (VPProcess.from_betas(), "eps", "eps"),
        (VPProcess.from_betas(), "v", "v"),
        (FlowProcess(shift=3.0), "velocity", "velocity"),
        (TrigProcess(0.5), "velocity", "velocity"),
    ],
    ids=lambda value: str(value),
)
def test_any_process_and_prediction_type_trains(process, kind, space, tmp_path):
    method = DMD2(teacher(process, kind), critic_space=space, sigma_data=0.5)
    result = train([Stage(method, steps=11, optim=OPTIM)], settings(tmp_path, proof_window=11))
    assert result.reason == "finished"
    assert all(math.isfinite(v) for line in result.history for k, v in line.items() if "/" in k)
    assert not torch.equal(weights(method.players["student"]), weights(method.frozen["teacher"]))


def test_bfloat16_autocast_keeps_the_loss_in_float32(tmp_path):
    method = moved_apart(DMD2(teacher()))
    with torch.autocast("cpu", torch.bfloat16):
        terms, carry = method.student_loss(prepared(method))
    assert terms["dmd"].dtype == torch.float32
    assert carry["images"].dtype == torch.float32
    train([Stage(method, steps=6, optim=OPTIM)], settings(tmp_path, mixed_precision="bf16"))


def test_a_teacher_of_another_run_stage_is_handed_over(tmp_path):
    """A class takes the handover as its first argument."""
    first = DMD2(teacher())
    stages = [
        Stage(first, steps=2, optim=OPTIM, name="first"),
        Stage(DMD2, steps=2, optim=OPTIM, name="second"),
    ]
    result = train(stages, settings(tmp_path))
    handed_over = result.method.frozen["teacher"]
    assert handed_over.denoiser is first.players["student"]
    assert (handed_over.sampler, handed_over.steps, handed_over.shape) == ("student", 1, SHAPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "conditions"),
        ({"critic_space": "score"}, "'x0', 'eps', 'v', 'velocity'"),
        ({"student_steps": 0}, "n=0"),
        ({"guidance_interval": (5.0, 0.3)}, "guidance_interval"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DMD2(teacher(), **options)


TABLE = VPProcess.from_betas()


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (TABLE, {"critic_space": "velocity"}, "critic_space='velocity' is not allowed: a table"),
        (TABLE, {"score_times": TimeLaw("index", low=20, high=1200)}, r"score_times=.* reaches 1199, .* end at 999"),
        (FlowProcess(), {"critic_times": TimeLaw("lognormal", mean=-1.2, std=1.2)}, r"critic_times=.* end at 1"),
        (FlowProcess(), {"score_times": TimeLaw("index", low=20, high=980)}, r"score_times=.* end at 1"),
    ],
)
def test_times_and_spaces_that_the_path_lacks_are_refused_before_the_first_step(process, options, message):
    with pytest.raises(ValueError, match=message):
        DMD2(small.small_generator(process, "eps"), **options)


@pytest.mark.parametrize(
    ("process", "law"),
    [
        (EDMProcess(), TimeLaw("lognormal", mean=-1.2, std=1.2)),
        (FlowProcess(max_t=0.9), TimeLaw("uniform")),
        (TABLE, TimeLaw("uniform", high=999.0)),
    ],
    ids=repr,
)
def test_times_of_the_whole_path_are_taken(process, law):
    assert DMD2(small.small_generator(process, "eps"), score_times=law, critic_times=law).score_times == law


def test_a_rate_below_one_is_refused():
    with pytest.raises(ValueError, match="student_every=0"):
        DMD2(teacher(), student_every=0)


def test_class_labels():
    labels, null = ClassLabels(3)({}, draw(rows=3000))
    assert torch.bincount(labels).shape == (3,)
    assert (torch.bincount(labels) - 1000).abs().max() < 150
    assert set(null.tolist()) == {3}
    with pytest.raises(ValueError, match="num_classes"):
        ClassLabels(0)
