"""Before a generator's run: a teacher that is read otherwise than it was trained is found, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mnist_ddpm import published
from pipeline_folders import stable_diffusion
from torch import Tensor, nn

from diffusion.codecs import Pixels
from diffusion.conditions import ClassLabels, Prompts
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.models import open_generator
from diffusion.preflight import TABLE_ROWS, TABLES, read, read_batch, read_own
from diffusion.process import ContinuousVPProcess, EDMProcess, FlowProcess, Process, TrigProcess, VPProcess
from diffusion.workshop import Generators
from visiondistill import recipes
from visiondistill.data import Source, Split, TensorData
from visiondistill.engine.errors import SettingsError

SHAPE, KNOWN = (3, 8, 8), 12
VP, FLOW, EDM, CVP = VPProcess.from_betas(), FlowProcess(), EDMProcess(), ContinuousVPProcess()
LINEAR, COSINE = VPProcess.from_betas("linear", 1e-4, 0.02), VPProcess.from_betas("squaredcos_cap_v2")
NAMED = {"linear": LINEAR, "scaled_linear": VP, "squaredcos_cap_v2": COSINE}


def known_images() -> Tensor:
    """`[KNOWN, *SHAPE]` in [0, 1], smooth, and so unlike that noise hides none of them."""
    coarse = torch.rand(KNOWN, 3, 3, 3, generator=torch.Generator().manual_seed(0)).round()
    return nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")


class Posterior(nn.Module):
    """The exact prediction for data that are one of the known images, but for an error of x0 of this size."""

    def __init__(self, process: Process, kind: str, error: float = 0.0) -> None:
        super().__init__()
        self.process, self.kind, self.error = process, kind, error
        self.register_buffer("known", known_images() * 2 - 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.asked: list[tuple[int, object]] = []

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        self.asked.append((len(x), condition))
        a, s = (f(t).view(-1, 1).float() for f in (self.process.alpha, self.process.sigma))
        distance = torch.cdist(x.flatten(1), self.known.flatten(1) * a[:1]).square()
        x0 = (-distance / (2 * s**2)).softmax(1) @ self.known.flatten(1)
        if self.error:
            x0 = x0 + self.error * noise_of(x0)
        return self.process.convert(x0.view_as(x) * self.scale, x, t, "x0", self.kind)


def noise_of(x0: Tensor) -> Tensor:
    return torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))


class Nothing(nn.Module):
    """Before its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.scale * x


def teacher(process: Process, kind: str, declared: str | None = None, error: float = 0.0, **options) -> Generator:
    return Generator(Denoiser(Posterior(process, kind, error), process, declared or kind), SHAPE, **options)


def source(splits: tuple[str, ...] = ("train", "val"), size: int = SHAPE[1]) -> Source:
    label = torch.zeros(KNOWN, dtype=torch.int64)
    images = nn.functional.interpolate(known_images(), (size, size))
    held = Split(TensorData({"image": images, "label": label}), label)
    return Source(dict.fromkeys(splits, held), ("all",), (3, size, size), val_fraction=0, test_fraction=0)


def told(given: Generator, data: Source | None, folder: Path, **settings) -> list[str]:
    """The preflight's notes for Diff-Instruct from a teacher."""
    config = recipes.load("diff_instruct")
    del config["teacher"]
    settings = {f"method.{name}": value for name, value in settings.items()}
    config = recipes.override(config, {"run.output_dir": str(folder), "run.device": "cpu"} | settings)
    plan = recipes.plan(config, {"teacher": given} | ({} if data is None else {"data": data}))
    return list(Generators().preflight(plan).notes)


# --- prediction types

WRONG = [
    pytest.param(process, kind, declared, id=f"{type(process).__name__}: {kind} as {declared}")
    for process, kinds in ((VP, ("x0", "eps", "v")), (FLOW, ("x0", "velocity", "v")), (CVP, ("x0", "eps", "v")))
    for kind in kinds
    for declared in kinds
    if declared != kind
]


@pytest.mark.parametrize("error", [0.0, 0.2])
@pytest.mark.parametrize(("process", "kind", "declared"), WRONG)
def test_a_wrong_prediction_type_is_refused_and_the_right_one_named(process, kind, declared, error):
    reading = read(teacher(process, kind, declared, error), known_images())
    with pytest.raises(SettingsError, match=rf"read as '{declared}'.*its prediction type is '{kind}'"):
        reading.check()


@pytest.mark.parametrize("error", [0.0, 0.2, 0.4])
@pytest.mark.parametrize(
    ("process", "kind"), [(VP, "eps"), (VP, "v"), (FLOW, "velocity"), (EDM, "x0"), (EDM, "eps"), (CVP, "v")], ids=str
)
def test_the_right_one_passes_however_far_it_was_trained(process, kind, error):
    assert "validation images" in read(teacher(process, kind, error=error), known_images()).check()


def test_the_error_is_relative_to_the_best_affine_guess():
    """Both are mean squares of x0, joined over the levels of noise by their geometric mean."""
    images = known_images()
    variance = float((images * 2 - 1).double().var(correction=0))
    levels = ((2 / 3, 1 / 3), (1 / 2, 1 / 2), (1 / 3, 2 / 3))
    trivial = math.prod(variance * s**2 / (a**2 * variance + s**2) for a, s in levels) ** (1 / 3)
    own = 0.3**2 * float(noise_of(images.flatten(1)).square().mean())
    found = read(teacher(FLOW, "velocity", error=0.3), images).errors["velocity"]
    assert found == pytest.approx(own / trivial, rel=0.02)
    assert read(teacher(FLOW, "velocity"), images).errors["velocity"] < 0.01


def test_another_range_of_pixels_is_said():
    given = teacher(FLOW, "velocity")
    given.codec = Pixels(0.0, 8.0)
    assert "the range of its pixels" in read(given, known_images()).check()


RIGHT = [
    pytest.param(process, kind, id=f"{process!r}: {kind}")
    for process, kinds in (
        *((table, ("eps", "v", "x0")) for table in (VP, LINEAR, COSINE)),
        (CVP, ("eps", "v", "x0", "velocity")),
        (FLOW, ("velocity", "eps", "v", "x0")),
        (EDM, ("x0", "eps", "v", "velocity")),
        (TrigProcess(0.5), ("velocity", "x0")),
        (LINEAR, ("score",)),
    )
    for kind in kinds
]


@pytest.mark.parametrize("error", [0.0, 0.3])
@pytest.mark.parametrize(("process", "kind"), RIGHT)
def test_nothing_more_is_said_of_a_right_teacher(process, kind, error):
    given = teacher(process, kind, error=error)
    assert read(given, known_images()).check().endswith(f"error on {KNOWN} validation images")
    assert read_own(given).check().endswith("0.00 of the trivial predictor's error on 11 samples of its own")


# --- tables of noise levels


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize(
    ("trained", "declared"), [(trained, declared) for trained in NAMED for declared in NAMED if trained != declared]
)
def test_a_table_that_is_far_from_the_trained_one_is_refused(trained: str, declared: str, kind: str):
    given = Generator(Denoiser(Posterior(NAMED[trained], kind), NAMED[declared], kind), SHAPE)
    reading = read(given, known_images())
    assert set(reading.tables) == set(NAMED) - {declared}
    with pytest.raises(SettingsError, match=rf"by diffusers' '{trained}'.* it is 0\.00: give it the beta_schedule"):
        reading.check()


def test_a_table_that_is_merely_better_is_said():
    """Where a teacher errs anyway, a wrong table is less than twice as bad."""
    given = Generator(Denoiser(Posterior(LINEAR, "eps", 0.3), COSINE, "eps"), SHAPE)
    line = read(given, known_images()).check()
    assert "by diffusers' 'linear' (beta_start 0.0001, beta_end 0.02) it is 0.33: was it trained with its own?" in line


def test_tables_are_compared_where_both_have_the_levels():
    short = VPProcess.from_betas("linear", 1e-3, 0.3, num_timesteps=50)
    assert read(teacher(short, "eps"), known_images()).tables == {}
    assert read(teacher(FLOW, "velocity"), known_images()).tables == {}
    betas = VPProcess.from_betas("linear", 8.5e-4, 0.02)
    assert set(read(teacher(betas, "eps"), known_images()).tables) == set(TABLES)


def test_each_level_and_table_costs_one_pass():
    given = teacher(VP, "eps")
    read(given, known_images().repeat(3, 1, 1, 1))
    assert [rows for rows, _ in given.denoiser.network.asked] == 3 * [3 * KNOWN] + 6 * [TABLE_ROWS]


# --- without images


@pytest.mark.parametrize("error", [0.0, 0.2])
@pytest.mark.parametrize(("process", "kind", "declared"), WRONG)
def test_samples_of_its_own_tell_a_wrong_prediction_type(process, kind, declared, error):
    reading = read_own(teacher(process, kind, declared, error))
    with pytest.raises(SettingsError, match=rf"read as '{declared}'.*of its own.*its prediction type is '{kind}'"):
        reading.check()


def test_a_published_model_is_read_by_its_own_samples(shared_dir: Path):
    made = published(shared_dir)
    assert "samples of its own" in read_own(made).check()
    made.denoiser.prediction_type = "v"
    with pytest.raises(SettingsError, match="its prediction type is 'eps'"):
        read_own(made).check()


def test_a_right_teacher_is_asked_at_eight_steps_and_three_levels():
    given = teacher(VP, "eps")
    read_own(given)
    assert [rows for rows, _ in given.denoiser.network.asked] == 11 * [11]


class Pattern(nn.Module):
    """Knows nothing: one picture by condition, with so much of the input."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.table = share, nn.Embedding(4, SHAPE[0] * SHAPE[1] * SHAPE[2])

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.table(condition).view_as(x) + self.share * torch.tanh(x)


@pytest.mark.parametrize("declared", ["x0", "eps", "v"])
@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_one_answer_to_everything_is_not_taken_for_knowledge(declared: str, null: bool, share: float):
    torch.manual_seed(0)
    conditions = ClassLabels(3, null=null)
    assert read_own(Generator(Denoiser(Pattern(share), VP, declared), SHAPE, conditions=conditions)) is None


@pytest.mark.parametrize("process", [VP, FLOW, EDM], ids=repr)
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_a_network_before_its_first_step_is_not_refused(process: Process, gain: float):
    for seed in range(3):
        torch.manual_seed(seed)
        network = Convolutions(gain)
        for declared in ("x0", "eps", "v"):
            assert read_own(Generator(Denoiser(network, process, declared), SHAPE)) is None
            assert read_own(Generator(Denoiser(Nothing(), process, declared), SHAPE)) is None


class Convolutions(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        for p in self.parameters():
            nn.init.normal_(p, std=gain * p.detach().std().item())

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.layers(x)


# --- conditions


def prompts() -> Prompts:
    """Two, of which the null one is told by its number."""
    return Prompts(["a", "b"], {"words": torch.tensor([[1.0], [2.0]])}, {"words": torch.tensor([[-1.0]])})


def conditions_asked(given: Generator) -> set[tuple[float, ...]]:
    asked = [condition for _, condition in given.denoiser.network.asked]
    return {tuple(each["words"].flatten().tolist()) for each in asked}


def test_images_without_prompts_are_denoised_with_the_empty_one():
    given = teacher(FLOW, "velocity", conditions=prompts())
    read_batch(given, {"image": known_images()}, "images").check()
    assert conditions_asked(given) == {KNOWN * (-1.0,)}
    given.denoiser.network.asked.clear()
    read_batch(given, {"image": known_images(), "prompt": torch.arange(KNOWN) % 2}, "images")
    assert conditions_asked(given) == {KNOWN // 2 * (1.0, 2.0)}


def test_the_empty_prompt_makes_its_own_samples():
    given = teacher(FLOW, "velocity", conditions=prompts())
    read_own(given)
    assert conditions_asked(given) == {11 * (-1.0,)}


def test_codes_are_noised_as_they_are():
    given = teacher(FLOW, "velocity", error=0.3)
    given.codec = Pixels(0.0, 8.0)
    ours = read_batch(given, {"code": known_images() * 2 - 1}, "codes")
    assert ours.errors == read(teacher(FLOW, "velocity", error=0.3), known_images()).errors


# --- a plan


def test_a_good_teacher_is_measured_and_what_it_gives_is_said(tmp_path: Path):
    given = teacher(VP, "v", steps=7)
    given.notes = ("its scheduler clips samples",)
    notes = told(given, source(), tmp_path, student_steps=4)
    assert any(line.startswith("teacher: 1 parameters, predicts v on VPProcess") for line in notes)
    assert "teacher: its scheduler clips samples" in notes
    (measured,) = [line for line in notes if line.startswith("teacher measured: 0.0")]
    assert measured.endswith(f"on {KNOWN} validation images")
    (times,) = [line for line in notes if line.startswith("sampled with")]
    assert times.startswith("sampled with student, 4 steps at 999, 749, 499, 249, ")
    assert any(line.startswith("will not be exported: ") for line in notes)


def test_a_wrong_type_ends_the_run_before_it_begins(tmp_path: Path):
    with pytest.raises(SettingsError, match="its prediction type is 'eps'"):
        told(teacher(VP, "eps", declared="v"), source(), tmp_path)


def test_an_untrained_teacher_is_said_and_not_refused(tmp_path: Path):
    given = Generator(Denoiser(Nothing(), FLOW, "velocity"), SHAPE)
    (line,) = [line for line in told(given, source(), tmp_path) if line.startswith("teacher measured")]
    assert "it is not trained" in line


def test_images_of_another_size_are_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"images are \[3, 6, 6\], the teacher makes \[3, 8, 8\]"):
        told(teacher(VP, "v"), source(size=6), tmp_path)


def test_of_data_without_validation_images_those_of_the_training_are_noised(tmp_path: Path):
    notes = told(teacher(VP, "v"), source(("train",)), tmp_path)
    assert f"teacher measured: 0.00 of the trivial predictor's error on {KNOWN} training images" in notes
    with pytest.raises(SettingsError, match=r"12 training images.*its prediction type is 'eps'"):
        told(teacher(VP, "eps", declared="v"), source(("train",)), tmp_path)


@pytest.mark.parametrize("conditions", [None, prompts()])
def test_without_data_its_own_samples_are(conditions: Prompts | None, tmp_path: Path):
    notes = told(teacher(VP, "eps", conditions=conditions), None, tmp_path)
    assert "teacher measured: 0.00 of the trivial predictor's error on 11 samples of its own" in notes
    with pytest.raises(SettingsError, match="its prediction type is 'eps'"):
        told(teacher(VP, "eps", declared="v", conditions=conditions), None, tmp_path)


def test_why_nothing_was_measured_is_said(tmp_path: Path):
    notes = told(Generator(Denoiser(Nothing(), VP, "v"), SHAPE), None, tmp_path)
    untold = (
        "teacher not measured: there are no images, and its own samples are denoised by no prediction type: "
        "is it trained?"
    )
    assert untold in notes


def test_a_text_pipeline_of_random_weights_is_not_refused(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    folder = stable_diffusion(tmp_path / "sd", prediction_type="v_prediction")
    notes = told(open_generator(folder, prompts=str(tmp_path / "prompts.txt")), None, tmp_path)
    assert any(line.startswith("teacher not measured: there are no images") for line in notes)


def test_prompts_that_the_images_lack_do_not_keep_a_teacher_from_being_measured(tmp_path: Path):
    notes = told(teacher(VP, "v", conditions=prompts()), source(), tmp_path)
    assert f"teacher measured: 0.00 of the trivial predictor's error on {KNOWN} validation images" in notes


# --- what a student is taught, and how it is sampled


@pytest.mark.parametrize(
    ("sampled", "settings", "line"),
    [
        (1.0, {}, "with no guidance"),
        (3.0, {}, "with guidance 3"),
        (3.0, {"guidance_scale": 1}, "with no guidance, but it samples with guidance 3: its student learns the former"),
        (1.0, {"guidance_scale": 1.5}, "with guidance 1.5, but it samples with no guidance: "),
        (3.0, {"guidance_rescale": 0.5}, "with guidance 3, rescaled by 0.5, but it samples with guidance 3: "),
        (3.0, {"guidance_interval": [100, 800]}, "with guidance 3 at times 100 to 800, but it samples with guidance 3"),
    ],
)
def test_the_guidance_that_is_taught_is_said(sampled: float, settings: dict, line: str, tmp_path: Path):
    given = teacher(VP, "v", conditions=ClassLabels(2), guidance_scale=sampled)
    (said,) = [note for note in told(given, None, tmp_path, **settings) if note.startswith("the teacher's score")]
    assert said.startswith(f"the teacher's score is taken {line}")
    assert ("but it samples" in said) == ("but it samples" in line)


@pytest.mark.parametrize("process", [VP, FlowProcess(shift=3.0), EDM], ids=repr)
def test_every_time_of_the_student_can_be_read_back(process: Process, tmp_path: Path):
    kind = "v" if process is VP else "x0"
    (line,) = [
        note for note in told(teacher(process, kind), None, tmp_path, student_steps=12) if note.startswith("sampled")
    ]
    times = line.partition(" at ")[2].removesuffix(" (the last is the clean end)").split(", ")
    expected = process.student_times(12)
    assert len(times) == 13
    assert [type(expected.tolist()[0])(each) for each in times] == expected.tolist()
