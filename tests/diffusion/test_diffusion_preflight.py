"""Before a generator's run: a teacher that is read otherwise than it was trained is found, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion.codecs import Pixels
from diffusion.conditions import Prompts
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.preflight import read
from diffusion.process import ContinuousVPProcess, EDMProcess, FlowProcess, Process, VPProcess
from diffusion.workshop import Generators
from visiondistill import recipes
from visiondistill.data import Source, Split, TensorData
from visiondistill.engine.errors import SettingsError

SHAPE, KNOWN = (3, 8, 8), 12
VP, FLOW, EDM, CVP = VPProcess.from_betas(), FlowProcess(), EDMProcess(), ContinuousVPProcess()


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

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
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


def test_why_nothing_was_measured_is_said(tmp_path: Path):
    unmeasured = "teacher not measured: there are no validation images"
    assert unmeasured in told(teacher(VP, "v"), source(("train",)), tmp_path)
    assert unmeasured in told(teacher(VP, "v"), None, tmp_path)
    prompts = Prompts(["a"], {"words": torch.zeros(1, 2)}, {"words": torch.zeros(1, 2)})
    notes = told(teacher(VP, "v", conditions=prompts), source(), tmp_path)
    assert "teacher not measured: its prompts are not those of the validation images" in notes
