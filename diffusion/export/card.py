"""The model card: what a stranger needs to sample rightly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visiondistill.exported import training_section

USE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER"{opening})   # FOLDER: this one
images = pipeline({arguments}).images
```"""

ADAPTERS = """```python
from diffusers import {pipeline}, {scheduler}

pipeline = {pipeline}.from_pretrained("TEACHER")         # TEACHER: the model that they were trained on
pipeline.load_lora_weights("FOLDER")                     # FOLDER: this one
pipeline.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
images = pipeline(prompt, num_inference_steps={steps}, guidance_scale=1).images
```

The strength (alpha / rank) is in the weights themselves. **`guidance_scale=1` is not optional: the
pipeline guides by default, and this student was trained to be sampled without guidance.**"""


MERGED = (
    "The weights hold merged adapters. Alone, for `load_lora_weights` on the teacher's pipeline, these are in "
    "`{folder}/`, and its README says how they are loaded."
)


def render(facts: Mapping[str, Any]) -> str:
    """README.md of an export.

    Args:
        facts: what export.json holds, see `bundle.export_generator` and `bundle.export_lora`.
    """
    about = facts["about"]
    sections = [
        _front_matter(about),
        f"# {about['name']}",
        "## Use\n\n" + (_use_of_adapters(facts) if "adapters_of" in facts else _use(facts)),
        "## Training\n\n" + training_section(about),
        "## Figures\n\n" + _figures(about["metrics"]),
        "## Files\n\n" + "\n".join(f"- `{name}`: sha256 `{digest}`" for name, digest in facts["files"].items()),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(about: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: diffusers", "tags:", "- diffusion", "- distillation"]
    lines += [f"license: {about['license']}"] if about["license"] else []
    return "\n".join([*lines, "---"])


def _use_of_adapters(facts: Mapping[str, Any]) -> str:
    return ADAPTERS.format(**facts, pipeline=facts["adapters_of"])


def _use(facts: Mapping[str, Any]) -> str:
    named = facts["asked"] | {"num_inference_steps": facts["steps"]} | facts["call"]
    seed = {"generator": "torch.Generator().manual_seed(0)"} if facts["seeds_call"] else {}
    words = [f"{name}={value!r}" for name, value in named.items()] + [f"{name}={value}" for name, value in seed.items()]
    size = "x".join(map(str, facts["input_size"]))
    told = [
        USE.format(arguments=", ".join(words), opening="".join(f", {name}=None" for name in facts["opened_with"])),
        f"Images are {size}. The network is called at the times {', '.join(f'{t:g}' for t in facts['times'][:-1])}; "
        f"the images equal the training-time sampler's to {facts['largest_difference']:.1g} (pixels in [0, 1]).",
        *facts["notes"],
        *([MERGED.format(folder=facts["adapters"])] if "adapters" in facts else []),
        f"Weights: {facts['weights']['which']}, {facts['weights']['dtype']}, sha256 of the tensors "
        f"`{facts['weights']['sha256']}`.",
    ]
    return "\n\n".join(told)


def _figures(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "None were measured."
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in metrics.items()}
    return "\n".join(["| figure | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in shown.items())])
