"""How near a generator's images come to real ones, and what real ones score in their place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion.eval.distances import frechet_distance, kernel_distance, mean_distance, precision_recall
from diffusion.eval.extractors import Extractor, InceptionExtractor
from diffusion.eval.features import FeatureSet, collect, device_of
from diffusion.eval.reference import Reference, reference_features
from diffusion.generator import Generator
from visiondistill.data import Source
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.state import fingerprint, write_text
from visiondistill.eval import evaluating, weights_hash

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("fd", "kid", "pr", "diversity")
LEAST = 4
"""Images of which each has three neighbours."""
SUBSET = 1000
"""Images of a kernel distance's subsets, or half of those that there are: else all subsets would be one."""


@dataclass(frozen=True)
class GeneratorReport:
    """What `evaluate_generator` measured.

    Attributes:
        samples: figures of the generator by their names, None where there is nothing to measure them
            on: `fd_<extractor>`, or `fid` with the published Inception network; `kid_...` and its spread
            over subsets; `precision_...`, `recall_...`; `diversity_...`, the mean distance of two images'
            features, and `diversity_within_classes_...`, of two images of one class; `class_accuracy`, of
            a classifier that is asked for the classes that the samples were conditioned on.
        real: the same of real images in place of the samples, the noise floor: two disjoint random
            parts of the reference against each other, `self_split` images each; `class_accuracy` is
            that of the whole reference.
        count, steps, seed: of the samples.
        self_split: the samples' number, or half the reference where that is less.
        images_per_second: of sampling alone, decoding included.
        generator: its weights' sha256, sampler and guidance.
        reference: what the real images are, and their sha256.
        extractors: what each depends on, by name.
        classifier: sha256 of its weights; None without one.
        notes: what a reader should know besides.
    """

    samples: dict[str, float | None]
    real: dict[str, float | None]
    count: int
    steps: int
    seed: int
    self_split: int
    images_per_second: float
    generator: dict[str, Any]
    reference: dict[str, Any]
    extractors: dict[str, dict[str, Any]]
    classifier: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, complete: a figure never stands without n, its noise floor, extractor and reference."""
        return asdict(self)

    def table(self) -> Table:
        """For a terminal."""
        return comparison_table({f"{self.steps}-step": self})

    def write(self, folder: str | Path, name: str = "generation") -> Path:
        """Write `<name>.json`; returns its path."""
        path = Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        return path


def comparison_table(reports: Mapping[str, GeneratorReport]) -> Table:
    """Several generators beside each other and beside real images, for a terminal.

    Args:
        reports: title -> report; of one reference, count, extractor and classifier.

    Raises:
        ValueError: they differ in one of these, so that their figures cannot be compared.
    """
    from rich.table import Table

    first = _comparable(reports)
    table = Table(
        title=f"against {first.reference['images']:,} real images",
        title_justify="left",
        caption="\n".join(["real: two parts of the reference against each other", *first.notes]),
        caption_justify="left",
    )
    for column in ("", *reports, "real"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("n", *(f"{report.count:,}" for report in reports.values()), f"{first.self_split:,}")
    for name in first.samples:
        table.add_row(
            name, *(_written(each.get(name)) for each in (*(r.samples for r in reports.values()), first.real))
        )
    table.add_row("images/s", *(f"{report.images_per_second:.3g}" for report in reports.values()), "")
    return table


def evaluate_generator(
    generator: Generator,
    reference: Source | Tensor,
    extractors: Extractor | Sequence[Extractor],
    *,
    count: int = 2000,
    batch_size: int = 64,
    steps: int | None = None,
    seed: int = 0,
    split: str = "test",
    classifier: nn.Module | None = None,
    metrics: Sequence[str] = METRICS,
    cache: str | Path | None = None,
) -> GeneratorReport:
    """Measure a generator's images as they leave the sampler, rounded to 8 bits and never written to a file.

    The generator and the classifier run in eval mode and are left as they were.

    Args:
        generator: whose `images(count, batch_size, steps, seed)` are measured.
        reference: real images of the generator's size: a source's split, or `[N, C, H, W]`.
        extractors: one or several; the published Inception network stands alone.
        count: samples, at least 4. Frechet distances of unequal counts cannot be compared.
        split: of the source.
        classifier: of pixels in [0, 1], for the accuracy of class-conditional samples.
        metrics: of "fd", "kid", "pr" and "diversity".
        cache: folder where features of the reference are kept; None keeps none.

    Raises:
        SettingsError: an unknown metric, `fid` beside other extractors, fewer than 4 images on either side, no
            batch, images of different sizes, a classifier without labels, or images that are not in [0, 1].
    """
    extractors = [extractors] if isinstance(extractors, Extractor) else list(extractors)
    real, steps = Reference.of(reference, split), steps or generator.steps
    _check_extractors(extractors, metrics)
    _check_images(generator, real, count, classifier)
    if batch_size < 1:
        raise SettingsError(f"batch_size={batch_size} is not allowed: at least 1")
    laps: list[tuple[int, float]] = []
    stream = generator.images(count, batch_size=batch_size, steps=steps, seed=seed)
    with evaluating(generator):
        made = collect(_timed(stream, device_of(generator), laps), extractors, classifier)
    samples: dict[str, float | None] = {}
    floor: dict[str, float | None] = {}
    notes = []
    for extractor, ours in zip(extractors, made.sets, strict=True):
        theirs = reference_features(real, extractor, cache)
        first, second = theirs.halves(len(ours))
        samples |= _scores(extractor, metrics, ours, theirs)
        floor |= _scores(extractor, metrics, first, second)
        width = theirs.features.shape[1]
        if "fd" in metrics and len(first) <= width:
            notes.append(f"{extractor.name}: n is below its {width} features, and decides the distance")
    if classifier is not None:
        seen = collect(real.batches(), [], classifier)
        samples["class_accuracy"], floor["class_accuracy"] = made.accuracy, seen.accuracy
    return GeneratorReport(
        samples=samples,
        real=floor,
        count=len(made.label),
        steps=steps,
        seed=seed,
        self_split=len(first),
        images_per_second=_speed(laps),
        generator={
            "sha256": fingerprint(generator.state_dict()),
            "sampler": generator.sampler,
            **generator.guidance,
        },
        reference=real.info | {"sha256": real.sha256},
        extractors={extractor.name: extractor.facts for extractor in extractors},
        classifier=None if classifier is None else weights_hash(classifier),
        notes=tuple(notes),
    )


def _check_extractors(extractors: Sequence[Extractor], metrics: Sequence[str]) -> None:
    if unknown := [name for name in metrics if name not in METRICS]:
        raise SettingsError(f"metrics: no {unknown[0]!r}; there are {', '.join(METRICS)}")
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < max(1, len(names)):
        raise SettingsError(f"extractors: one or several, each once, got {names}")
    if len(names) > 1 and any(map(_published, extractors)):
        raise SettingsError(f"fid never stands beside other distances: measure it by itself, got {names}")


def _check_images(generator: Generator, real: Reference, count: int, classifier: nn.Module | None) -> None:
    there, size = len(real.data), generator.input_size[-3:]
    if count < LEAST or there < 2 * LEAST:
        raise SettingsError(
            f"need at least {LEAST} samples and {2 * LEAST} real images (two parts of {LEAST}), got {count} and {there}"
        )
    if size != real.size:
        raise SettingsError(
            f"samples are {'x'.join(map(str, size))}, real images {'x'.join(map(str, real.size))}: their resizing "
            f"would be measured; give real images of the samples' size"
        )
    if classifier is None:
        return
    known, asked = getattr(classifier, "num_classes", None), generator.num_classes
    if asked is None:
        raise SettingsError("class accuracy needs a generator that is conditioned on classes: leave the classifier out")
    if known not in (None, asked):
        raise SettingsError(f"the classifier tells {known} classes apart, the generator makes {asked}")


def _published(extractor: Extractor) -> bool:
    return isinstance(extractor, InceptionExtractor)


def _scores(extractor: Extractor, metrics: Sequence[str], x: FeatureSet, y: FeatureSet) -> dict[str, float | None]:
    """Figures of samples x against real images y, by their names."""
    behind = "" if _published(extractor) else f"_{extractor.name}"
    # Pairs of thousands of images are the extractor's device's work too.
    x, y = (each.to(device_of(extractor)) for each in (x, y))
    scores: dict[str, float | None] = {}
    if "fd" in metrics:
        scores[f"fd{behind}" if behind else "fid"] = frechet_distance(x.statistics, y.statistics)
    if "kid" in metrics:
        kernel = kernel_distance(x.features, y.features, size=min(SUBSET, len(x) // 2, len(y) // 2))
        scores |= {f"kid{behind}": kernel.mean, f"kid{behind}_spread": kernel.spread}
    if "pr" in metrics:
        coverage = precision_recall(x.features, y.features)
        scores |= {f"precision{behind}": coverage.precision, f"recall{behind}": coverage.recall}
    if "diversity" in metrics:
        scores[f"diversity{behind}"] = mean_distance(x.features)
        if (x.label >= 0).any():
            scores[f"diversity_within_classes{behind}"] = mean_distance(x.features, x.label)
    return scores


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _timed(
    stream: Iterator[tuple[Tensor, Tensor | None]], device: torch.device, laps: list[tuple[int, float]]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The stream itself; `laps` gets images and seconds of each batch."""
    while True:
        _wait(device)
        begun = time.perf_counter()
        batch = next(stream, None)
        _wait(device)
        if batch is None:
            return
        laps.append((len(batch[0]), time.perf_counter() - begun))
        yield batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(laps: list[tuple[int, float]]) -> float:
    """Images per second, without the first batch where there are more: it also warms up."""
    images, seconds = zip(*(laps[1:] or laps), strict=True)
    return sum(images) / sum(seconds)


def _comparable(reports: Mapping[str, GeneratorReport]) -> GeneratorReport:
    first, *others = reports.values()
    for name in ("reference", "count", "extractors", "classifier"):
        if any(getattr(other, name) != getattr(first, name) for other in others):
            raise ValueError(
                f"these generators were measured with a different {name}: their figures say nothing together"
            )
    return first
