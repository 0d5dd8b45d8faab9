"""A pipeline folder of diffusers that samples, without this package, as a generator does.

    model_index.json, unet/ or transformer/, scheduler/, vae/, text encoders     DiffusionPipeline.from_pretrained
    lora/                                      a LoRA student's adapters alone   pipeline.load_lora_weights
    README.md, export.json                                                       for people, and for `open_generator`

What was written is opened again and its images are compared before the folder gets its name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.conditions import ClassLabels, Prompts, TextEncoders
from diffusion.denoiser import EDMPreconditioner
from diffusion.export.card import render
from diffusion.export.pipelines import PipelinePlan, plan
from diffusion.export.schedulers import scheduler_for
from diffusion.generator import Generator
from diffusion.models.folder import pipeline_of
from diffusion.models.lora import is_lora, lora_state
from diffusion.models.networks import inner_model, with_denoiser
from diffusion.models.quiet import without_bars
from diffusion.process import FlowProcess
from visiondistill.engine.state import fingerprint, sha256_of
from visiondistill.exported import FACTS, About, check_free, written_whole

TOLERANCE = 1e-5
"""Of pixels in [0, 1]: diffusers computes in float32 what is float64 here."""

ROWS = 2
"""Images that are compared."""

ADAPTERS = "lora"
"""Subfolder of an export whose weights have adapters merged into them: these alone."""


@dataclass(frozen=True)
class ExportedPipeline:
    """What `export_generator` wrote.

    Attributes:
        folder: where.
        pipeline, scheduler: classes of diffusers.
        steps: `num_inference_steps` of the call.
        call: further arguments that the call needs.
        times: at which the network is called, in the process's own time.
        largest_difference: of pixels in [0, 1], reopened against `Generator.sample`.
        weights_sha256: of the network's tensors.
        weights: which they are: "EMA", "raw" ..., as given.
    """

    folder: Path
    pipeline: str
    scheduler: str
    steps: int
    call: dict[str, Any]
    times: tuple[float, ...]
    largest_difference: float
    weights_sha256: str
    weights: str

    @property
    def format(self) -> str:
        return f"diffusers {self.pipeline}"


class NotExportable(ValueError):
    """No pipeline of diffusers samples as the generator does; the message names the part and the cure."""


def why_not(generator: Generator, steps: int | None = None) -> str | None:
    """Before anything is trained: why `export_generator` would find no pipeline; None where it would find one."""
    try:
        with torch.random.fork_rng(devices=[]):
            _planned(portable(generator), steps or generator.steps)
    except NotExportable as error:
        return str(error)
    return None


@torch.no_grad()
def export_generator(
    generator: Generator,
    folder: str | Path,
    *,
    steps: int | None = None,
    about: About | None = None,
    weights: str = "as given",
    tolerance: float = TOLERANCE,
) -> ExportedPipeline:
    """Write a generator so that diffusers alone samples as it does, and prove that it does.

    Adapters of a LoRA student are merged into the weights; those of a text pipeline lie beside them
    alone, too, as `export_lora` writes them. Weights are written in float32. With several processes
    the first one alone calls this.

    Args:
        generator: a student, or a teacher whose sampler diffusers has.
        folder: new, empty, or an earlier export, which is replaced.
        steps: of sampling; default the generator's own.
        about: for the model card.
        weights: which weights the generator holds: "EMA", "raw".
        tolerance: of the comparison; teachers of many steps add up more of float32's rounding.

    Raises:
        NotExportable: no pipeline of diffusers samples so.
        ValueError: the folder is in use.
        RuntimeError: what was written does not sample as the generator does.
    """
    about, folder, steps = about or About(), Path(folder), steps or generator.steps
    check_free(folder)
    with written_whole(folder) as unfinished:
        # Building a network anew draws random weights before the given ones replace them.
        with torch.random.fork_rng(devices=[]):
            generator = portable(generator)
            written = _planned(generator, steps)
            with without_bars():
                written.pipeline.save_pretrained(unfinished, safe_serialization=True)
            apart = difference(unfinished, generator, written, steps)
        if not apart <= tolerance:
            raise RuntimeError(
                f"the pipeline that was written makes images that differ by {apart:.3g} from the generator's, more "
                f"than {tolerance:g}: nothing was exported"
            )
        exported = ExportedPipeline(
            folder,
            type(written.pipeline).__name__,
            type(written.pipeline.scheduler).__name__,
            steps,
            dict(written.call),
            tuple(generator.times(steps).tolist()),
            apart,
            fingerprint(_network(written).state_dict()),
            weights,
        )
        if is_lora(generator.denoiser) and _encoders(generator) is not None:
            export_lora(generator, unfinished / ADAPTERS, steps=steps, about=about, weights=weights)
        _describe(exported, unfinished, generator, written, about, weights)
    return exported


def _planned(generator: Generator, steps: int) -> PipelinePlan:
    try:
        return plan(generator, steps)
    except ValueError as error:
        raise NotExportable(str(error)) from error


@torch.no_grad()
def difference(folder: Path, generator: Generator, written: PipelinePlan, steps: int) -> float:
    """Largest difference of pixels between the folder's images and the generator's, for equal noise."""
    pipeline = pipeline_of(folder, **_absent(written))
    pipeline.set_progress_bar_config(disable=True)
    call = dict(written.call) | _asked(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = pipeline(**call, num_inference_steps=steps, output_type="pt").images
    return (_own(generator, steps) - _images(theirs)).abs().max().item()


def portable(generator: Generator) -> Generator:
    """A copy on the CPU, in float32 and eval mode: other devices and precisions round differently."""
    copied = with_denoiser(generator, copy.deepcopy(generator.denoiser))
    copied._modules["codec"] = copy.deepcopy(generator.codec)
    return copied.cpu().float().eval().requires_grad_(False)


def _own(generator: Generator, steps: int) -> Tensor:
    source = torch.Generator().manual_seed(0)
    noise, *noises = (torch.randn(ROWS, *generator.shape, generator=source) for _ in range(steps))
    condition, null_condition = (None, None)
    if generator.conditions is not None:
        condition, null_condition = generator.conditions.at(range(ROWS), noise.device)
    codes = generator.sample(noise, condition, null_condition, steps=steps, noises=noises)
    return generator.codec.decode(codes).clamp(0, 1)


def _images(given: Any) -> Tensor:
    """`[B, C, H, W]`; some pipelines give arrays with their channels last."""
    return given.cpu() if isinstance(given, Tensor) else torch.from_numpy(given).permute(0, 3, 1, 2)


def _asked(generator: Generator) -> dict[str, Any]:
    """Arguments of the pipeline's call that ask for the samples 0 to ROWS - 1, as `Conditions.at` counts them."""
    conditions = generator.conditions
    if isinstance(conditions, Prompts):
        return {"prompt": [conditions.texts[row % len(conditions.texts)] for row in range(ROWS)]}
    if isinstance(conditions, ClassLabels):
        batch = {} if type(inner_model(generator.denoiser)).__name__ != "UNet2DModel" else {"batch_size": ROWS}
        return batch | {"class_labels": [row % conditions.num_classes for row in range(ROWS)]}
    return {"batch_size": ROWS}


def export_lora(
    generator: Generator,
    folder: str | Path,
    *,
    steps: int | None = None,
    about: About | None = None,
    weights: str = "as given",
) -> Path:
    """Write a LoRA student's adapters without the base, for `pipeline.load_lora_weights(folder)`, and its scheduler.

    Their strength alpha/rank is multiplied into the weights, so that every loader gives them the
    strength that they were trained with.

    Args:
        generator, folder, steps, about, weights: as of `export_generator`.

    Raises:
        ValueError: a generator without adapters or prompts, or a folder that is in use.
    """
    import diffusers

    folder, steps = Path(folder), steps or generator.steps
    check_free(folder)
    if not is_lora(generator.denoiser):
        raise ValueError("the generator has no adapters: export it whole, by export_generator")
    encoders = _encoders(generator)
    if encoders is None:
        raise ValueError("adapters are loaded into a text pipeline, and this generator has none: export it whole")
    part = "transformer" if "Transformer" in type(inner_model(generator.denoiser)).__name__ else "unet"
    with written_whole(folder) as unfinished:
        pipeline = getattr(diffusers, encoders.pipeline)
        pipeline.save_lora_weights(unfinished, **{f"{part}_lora_layers": lora_state(generator.denoiser)})
        scheduler = scheduler_for(generator, steps)
        scheduler.save_pretrained(unfinished / "scheduler")
        facts = {
            "adapters_of": encoders.pipeline,
            "scheduler": type(scheduler).__name__,
            "steps": steps,
            "weights": weights,
            "files": _files(unfinished),
            "about": asdict(about or About()),
        }
        _write_facts(unfinished, facts)
    return folder


def _encoders(generator: Generator) -> TextEncoders | None:
    """Those of a text pipeline; adapters can be loaded into no other."""
    return getattr(generator.conditions, "encoders", None)


def _absent(written: PipelinePlan) -> dict[str, None]:
    """Parts that the pipeline lacks and must be opened without, by name, such as SD3's third text encoder."""
    optional = type(written.pipeline)._optional_components
    return {name: None for name, part in written.pipeline.components.items() if part is None and name not in optional}


def _network(written: PipelinePlan) -> Any:
    return getattr(written.pipeline, "unet", None) or written.pipeline.transformer


def _describe(
    exported: ExportedPipeline, folder: Path, generator: Generator, written: PipelinePlan, about: About, weights: str
) -> None:
    network = generator.denoiser.network
    facts = {
        "pipeline": exported.pipeline,
        "scheduler": exported.scheduler,
        "steps": exported.steps,
        "opened_with": _absent(written),
        "call": exported.call,
        "asked": _asked(generator),
        "seeds_call": written.seeds_call,
        "notes": list(written.notes),
        "times": list(exported.times),
        "sampler": generator.sampler,
        "process": repr(generator.process),
        "prediction_type": generator.denoiser.prediction_type,
        **generator.guidance,
        "input_size": list(generator.input_size),
        "largest_difference": exported.largest_difference,
        "weights": {"which": weights, "sha256": exported.weights_sha256, "dtype": "float32"},
        "files": _files(folder),
        "about": asdict(about),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers")},
    }
    if (folder / ADAPTERS).is_dir():
        facts["adapters"] = ADAPTERS
    if generator.num_classes:
        facts["num_classes"] = generator.num_classes
    if isinstance(network, EDMPreconditioner):
        facts["sigma_min"] = network.sigma_min
    if isinstance(generator.process, FlowProcess):
        facts["shift"] = generator.process.shift
    _write_facts(folder, facts)


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False, default=str), "utf-8")
    (folder / "README.md").write_text(render(facts), "utf-8")


def _files(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
