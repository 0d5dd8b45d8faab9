"""`evaluate fd|fid|kid|pr`: the generator of a run or of a pipeline's folder, measured on a source's images."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from diffusion.eval.extractors import INCEPTION, extractor_of, open_classifier
from diffusion.eval.report import GeneratorReport, evaluate_generator
from diffusion.generator import Generator
from diffusion.subject import generator_of, source_of
from visiondistill import recipes
from visiondistill.data import Source
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.launch import launch
from visiondistill.preflight import require_class_names

METRICS = {"fd": ("fd", "diversity"), "fid": ("fd", "diversity"), "kid": ("kid",), "pr": ("pr",)}
"""What each topic measures."""

CACHE = "reference_features"
"""Beside a run or a pipeline, so that those of one folder share it."""


def run_evaluation(
    topic: str,
    *,
    run: str | None = None,
    pipeline: str | None = None,
    extractor: str | None = None,
    extractor_weights: str | None = None,
    classifier: str | None = None,
    count: int = 2000,
    steps: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    split: str = "test",
    output_dir: str | None = None,
    cache_dir: str | None = None,
    changes: recipes.Config | None = None,
) -> tuple[GeneratorReport, Path]:
    """Measure, and write the report.

    Args:
        topic: of `METRICS`; "fid" is measured with the published Inception network alone.
        run, pipeline: folder of one of them; a run is measured by its export.
        extractor, extractor_weights: as of `extractor_of`; SqueezeNet where none is named.
        classifier: folder of an export or a run, for class accuracy.
        count, seed, batch_size, split: as of `evaluate_generator`; steps 0 is the generator's own number.
        output_dir: of the report; by default `evaluation` in the run's or pipeline's folder.
        cache_dir: of the reference's features; by default beside that folder.
        changes: dotted keys of data and of how the generator is opened: `{"data.root": "photos",
            "generator.guidance_scale": 4.0}`.

    Returns:
        The report, and the file that it was written to.

    Raises:
        RecipeError, SettingsError: neither or both of run and pipeline, no data, or as of what is called.
    """
    if topic == "fd" and extractor == INCEPTION:
        raise recipes.RecipeError(f"--extractor {INCEPTION}: that distance is FID; measure it by evaluate fid")
    if topic == "fid" and extractor not in (None, INCEPTION):
        raise recipes.RecipeError(f"--extractor {extractor}: fid has an extractor of its own; measure evaluate fd")
    source = None if run is None and pipeline is None else source_of(run, changes or {})
    generator = generator_of(run, pipeline, changes or {})
    _check_steps(generator, steps or generator.steps)
    name = extractor or (INCEPTION if topic == "fid" else "squeezenet")
    device = launch().device
    network = extractor_of(name, extractor_weights).to(device)
    judge = None if classifier is None else _judge(classifier, source).to(device)
    folder = Path(run or pipeline)
    report = evaluate_generator(
        generator.to(device),
        source,
        network,
        count=count,
        batch_size=batch_size,
        steps=steps or None,
        seed=seed,
        split=split,
        classifier=judge,
        metrics=METRICS[topic],
        cache=cache_dir or folder.resolve().parent / CACHE,
    )
    file = topic if topic == "fid" else f"{topic}_{network.name.replace('/', '-')}"
    return report, report.write(output_dir or folder / "evaluation", file)


def _check_steps(generator: Generator, steps: int) -> None:
    try:
        generator.times(steps)
    except ValueError as error:
        raise SettingsError(f"--steps {steps}: {error}") from error


def _judge(folder: str, source: Source) -> nn.Module:
    network, classes = open_classifier(folder)
    require_class_names(classes, source.classes, f"classifier {folder}")
    return network
