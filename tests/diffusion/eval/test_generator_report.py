"""A generator's report: its figures on a law that is known, their noise floor, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from diffusion.eval import (
    Extractor,
    GeneratorReport,
    InceptionExtractor,
    RandomExtractor,
    collect,
    comparison_table,
    evaluate_generator,
    mean_distance,
)
from diffusion.generator import Generator
from visiondistill.data import EmbeddedDigits

Make = Callable[..., Generator]
Images = Callable[..., Tensor]


class Published(InceptionExtractor):
    """Stands where the published Inception network would."""

    def __init__(self) -> None:
        Extractor.__init__(self, "inception", "none", {})
        self.inner = RandomExtractor()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inner(pixels)


class Plain(Extractor):
    """Pixels themselves."""

    def __init__(self) -> None:
        super().__init__("pixels", "none", {}, channels=None)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 255


def test_the_right_law_scores_as_real_images_do(make_generator: Make, real_images: Images, by_brightness: nn.Module):
    report = evaluate_generator(
        make_generator(), real_images(), RandomExtractor(), count=200, batch_size=50, classifier=by_brightness
    )
    samples, real = report.samples, report.real
    assert (report.count, report.self_split, report.steps) == (200, 200, 1)
    assert samples["fd_random"] < 1.5 * real["fd_random"]
    assert abs(samples["kid_random"]) < 3 * real["kid_random_spread"]
    assert samples["precision_random"] > 0.8
    assert samples["recall_random"] > 0.8
    assert samples["diversity_random"] == pytest.approx(real["diversity_random"], rel=0.05)
    assert samples["diversity_within_classes_random"] < samples["diversity_random"] / 2
    assert samples["class_accuracy"] == 1
    assert real["class_accuracy"] is None, "the tensor has no labels"
    assert report.images_per_second > 0


def test_a_wrong_law_is_seen(make_generator: Make, real_images: Images, by_brightness: nn.Module):
    right, wrong = (
        evaluate_generator(
            make_generator(contrast), real_images(), RandomExtractor(), count=200, classifier=by_brightness
        )
        for contrast in (0.1, 0.0)
    )
    assert wrong.samples["fd_random"] > 3 * right.samples["fd_random"]
    assert wrong.samples["recall_random"] < 0.2
    assert wrong.samples["diversity_within_classes_random"] < 0.1 * right.samples["diversity_within_classes_random"]
    assert wrong.real == right.real
    dark = evaluate_generator(make_generator(conditioned=False), real_images(), RandomExtractor(), count=200)
    assert dark.samples["kid_random"] > 10 * right.real["kid_random_spread"]


def test_figures_do_not_depend_on_the_batch_size(make_generator: Make, real_images: Images):
    small, large = (
        evaluate_generator(make_generator(), real_images(), RandomExtractor(), count=50, batch_size=size)
        for size in (7, 50)
    )
    assert small.samples == pytest.approx(large.samples, rel=1e-3, abs=1e-7)


def test_samples_are_streamed_and_rounded(make_generator: Make, real_images: Images):
    """What is measured is what `images` gives, at the seed and steps asked for, in 8 bits."""
    generator = make_generator().eval()
    expected = torch.cat([images for images, _ in generator.images(8, seed=5)])
    extractor = Plain()
    held = collect(generator.images(8, batch_size=3, seed=5), [extractor]).sets[0]
    assert torch.equal(held.features, (expected * 255).round().flatten(1) / 255)
    assert held.label.tolist() == [0, 1, 2, 3] * 2
    report = evaluate_generator(generator, real_images(), extractor, count=8, seed=5, metrics=("diversity",))
    assert report.samples["diversity_pixels"] == pytest.approx(mean_distance(held.features), rel=1e-9)


def test_frames_of_videos_count_as_images(make_generator: Make, real_images: Images):
    generator = make_generator(shape=(3, 1, 8, 8))
    report = evaluate_generator(generator, real_images(), Plain(), count=10, metrics=("diversity",))
    assert report.count == 30
    held = collect(generator.eval().images(2, batch_size=2), [Plain()])
    assert held.sets[0].features.shape == (6, 64)
    assert held.label.tolist() == [0, 0, 0, 1, 1, 1]


def test_everything_is_left_as_it_was(make_generator: Make, real_images: Images, by_brightness: nn.Module):
    generator = make_generator().train()
    judge = nn.Sequential(nn.Dropout(0.9), by_brightness).train()
    state = torch.get_rng_state()
    one, two = (
        evaluate_generator(generator, real_images(), RandomExtractor(), count=20, classifier=judge) for _ in range(2)
    )
    assert one.samples == two.samples, "dropout is off"
    assert one.samples["class_accuracy"] == 1
    assert generator.training
    assert generator.denoiser.network.dropout.training
    assert judge[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_real_images_are_classified_too(make_generator: Make, real_images: Images):
    source, generator = EmbeddedDigits(), make_generator(conditioned=True)
    generator.conditions.num_classes = 10

    class Zeros(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)]

    report = evaluate_generator(generator, source, Plain(), count=20, classifier=Zeros(), metrics=("diversity",))
    label = source.split("test").label
    assert report.real["class_accuracy"] == pytest.approx((label == 0).double().mean().item())
    assert report.samples["class_accuracy"] == pytest.approx(0.1)
    assert report.reference["split"] == "test"


def test_the_report_is_complete_and_plain(make_generator: Make, real_images: Images, tmp_path: Path):
    extractor = RandomExtractor()
    report = evaluate_generator(make_generator(), real_images(), [extractor, Plain()], count=20, seed=3)
    path = report.write(tmp_path / "new", "fd")
    assert path == tmp_path / "new" / "fd.json"
    read = json.loads(path.read_text())
    assert read["count"] == read["self_split"] == 20
    assert read["seed"] == 3
    assert read["extractors"]["random"]["sha256"] == extractor.identity
    assert read["reference"]["images"] == 400
    assert {"fd_random", "fd_pixels", "kid_pixels_spread", "recall_random"} <= set(read["samples"]) & set(read["real"])
    assert any("224 features" in note for note in report.notes)


def test_the_noise_floor_is_at_most_half_the_reference(make_generator: Make, real_images: Images):
    report = evaluate_generator(make_generator(), real_images(60), Plain(), count=50, metrics=("fd",))
    assert (report.count, report.self_split) == (50, 30)
    text = shown(report)
    assert re.search(r"n +│ +50 │ +30 ", text)
    assert "against 60 real images" in " ".join(text.split())


def shown(report: GeneratorReport) -> str:
    console = Console(width=120, record=True)
    console.print(report.table())
    return console.export_text()


def test_fid_is_named_by_the_published_network_alone(make_generator: Make, real_images: Images):
    report = evaluate_generator(make_generator(), real_images(), Published(), count=20)
    assert {"fid", "kid", "kid_spread", "precision", "recall"} <= set(report.samples)
    assert not any("fd" in name for name in report.samples)
    ours = evaluate_generator(make_generator(), real_images(), RandomExtractor(), count=20)
    assert not {"fid", "kid", "precision"} & set(ours.samples)
    impostor = RandomExtractor()
    impostor.name = "inception"
    named = evaluate_generator(make_generator(), real_images(), impostor, count=20, metrics=("fd",))
    assert set(named.samples) == {"fd_inception"}
    with pytest.raises(ValueError, match="fid never stands beside"):
        evaluate_generator(make_generator(), real_images(), [Published(), RandomExtractor()], count=20)
    with pytest.raises(ValueError, match="different extractors"):
        comparison_table({"teacher": report, "student": ours})


def test_generators_are_compared_on_equal_terms_alone(make_generator: Make, real_images: Images):
    def measured(count: int = 20, seed: int = 1, contrast: float = 0.1) -> GeneratorReport:
        return evaluate_generator(
            make_generator(contrast), real_images(seed=seed), Plain(), count=count, metrics=("diversity",)
        )

    table = comparison_table({"teacher": measured(), "student": measured(contrast=0.2)})
    assert [column.header for column in table.columns] == ["", "teacher", "student", "real"]
    for other, what in ((measured(count=24), "count"), (measured(seed=2), "reference")):
        with pytest.raises(ValueError, match=f"different {what}"):
            comparison_table({"teacher": measured(), "student": other})


def test_what_cannot_be_measured_is_refused(make_generator: Make, real_images: Images, by_brightness: nn.Module):
    generator, real, random = make_generator(), real_images(40), RandomExtractor()
    unlabelled = make_generator(conditioned=False)

    class Three(nn.Module):
        num_classes = 3

    for call, named in (
        (lambda: evaluate_generator(generator, real, random, metrics=("fid",)), "no 'fid'"),
        (lambda: evaluate_generator(generator, real, []), "one or several"),
        (lambda: evaluate_generator(generator, real, [random, RandomExtractor()]), "each once"),
        (lambda: evaluate_generator(generator, real, random, count=3), "at least 4"),
        (lambda: evaluate_generator(generator, real, random, count=9, batch_size=0), "batch_size=0"),
        (lambda: evaluate_generator(generator, real[:7], random, count=9), "at least 4 samples and 8"),
        (lambda: evaluate_generator(generator, real.repeat(1, 1, 2, 2), random, count=9), "1x8x8.*1x16x16"),
        (lambda: evaluate_generator(unlabelled, real, random, count=9, classifier=by_brightness), "conditioned"),
        (lambda: evaluate_generator(generator, real, random, count=9, classifier=Three()), "3 classes"),
    ):
        with pytest.raises(ValueError, match=named):
            call()


def test_a_broken_generator_is_named(make_generator: Make, real_images: Images):
    with pytest.raises(ValueError, match=r"20 of 20 images .* not finite"):
        evaluate_generator(make_generator(math.nan), real_images(), RandomExtractor(), count=20)


@pytest.mark.gpu
def test_figures_of_a_device_are_those_of_the_processor(
    make_generator: Make, real_images: Images, by_brightness: nn.Module
):
    here, there = (
        evaluate_generator(
            make_generator().to(device),
            real_images(),
            RandomExtractor().to(device),
            count=200,
            classifier=by_brightness.to(device),
        )
        for device in ("cpu", "cuda")
    )
    assert there.samples == pytest.approx(here.samples, rel=0.02, abs=1e-4)
