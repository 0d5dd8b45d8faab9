"""A generator as a whole: samples that hang on their number alone, grids, samplers that its path has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.process import EDMProcess, FlowProcess, VPProcess
from diffusion.toys import exact_denoiser, ring


def labelled(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return label.view(-1, 1, 1, 1).to(x_t) / 10 + 0 * x_t


def test_a_sample_depends_on_its_number_and_the_seed_alone():
    generator = Generator(exact_denoiser(ring(), EDMProcess()), (2,), steps=6)
    whole = torch.cat([images for images, _ in generator.images(9, batch_size=9, seed=3)])
    parts = torch.cat([images for images, _ in generator.images(9, batch_size=4, seed=3)])
    assert torch.allclose(whole, parts, atol=1e-6)
    other = torch.cat([images for images, _ in generator.images(9, batch_size=9, seed=4)])
    assert not torch.allclose(whole, other, atol=1e-2)


def test_a_students_noise_is_the_samples_own_too():
    student = Generator(exact_denoiser(ring(), FlowProcess()), (2,)).student(exact_denoiser(ring(), FlowProcess()), 3)
    whole, parts = (torch.cat([images for images, _ in student.images(6, batch_size=rows)]) for rows in (6, 2))
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.equal(student.times(), FlowProcess().student_times(3))


def test_all_classes_in_turn_and_their_labels():
    generator = Generator(Denoiser(labelled, EDMProcess()), (1, 2, 2), conditions=ClassLabels(3), steps=2)
    ((images, labels),) = generator.images(7, batch_size=7)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.allclose(images[:, 0, 0, 0], (labels / 10 + 1) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("process", "sampler"), [(VPProcess.from_betas(), "ddim"), (EDMProcess(), "heun"), (FlowProcess(), "euler")]
)
def test_the_usual_sampler_of_each_path(process, sampler):
    assert Generator(exact_denoiser(ring(), process), (2,)).sampler == sampler


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_table_has_no_samplers_of_continuous_time(sampler):
    with pytest.raises(ValueError, match="ddim"):
        Generator(exact_denoiser(ring(), VPProcess.from_betas()), (2,), sampler=sampler)


def test_what_needs_conditions_says_so():
    with pytest.raises(ValueError, match="needs conditions"):
        Generator(exact_denoiser(ring(), EDMProcess()), (2,), guidance_scale=2.0)


GUIDED = {"guidance_scale": 3.0, "guidance_interval": (0.5, 20.0), "guidance_rescale": 0.4}


def test_it_samples_with_its_guidance_and_its_students_without():
    def network(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x_t / (1 + t.view(-1, 1, 1, 1)) * (1 + labelled(x_t, t, label))

    asked = []

    class Asked(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, **options: object) -> object:
            asked.append({name: told for name, told in options.items() if name != "null_condition"})
            return super().forward(x_t, t, condition, **options)

    noise, label = torch.randn(3, 1, 2, 2), torch.arange(3)
    generator = Generator(Asked(network, EDMProcess()), (1, 2, 2), conditions=ClassLabels(3), steps=4, **GUIDED)
    guided = generator.sample(noise, label, torch.full((3,), 3))
    assert asked
    assert all(told == GUIDED == generator.guidance for told in asked)
    for name, off in {"guidance_scale": 1.0, "guidance_interval": None, "guidance_rescale": 0.0}.items():
        other = Generator(generator.denoiser, (1, 2, 2), conditions=ClassLabels(3), steps=4, **GUIDED | {name: off})
        assert not torch.allclose(other.sample(noise, label, torch.full((3,), 3)), guided, atol=1e-3), name
    student = generator.student(generator.denoiser, 2)
    assert student.guidance == {"guidance_scale": 1.0, "guidance_interval": None, "guidance_rescale": 0.0}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"guidance_interval": (5.0, 0.3)}, "guidance_interval"), ({"guidance_rescale": 2.0}, "guidance_rescale=2.0")],
)
def test_guidance_that_cannot_be_is_refused_at_once(wrong: dict, told: str):
    with pytest.raises(ValueError, match=told):
        Generator(Denoiser(labelled, EDMProcess()), (1, 2, 2), conditions=ClassLabels(3), **wrong)
