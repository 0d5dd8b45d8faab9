"""The model card: what a stranger needs to use the weights rightly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from visiondistill.exported import training_section

NAMED = 200
"""Classes that are listed by name; the rest stand in export.json."""

TIMM_USE = """```python
import timm, torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()   # FOLDER: this one
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.no_grad():
    logits = model(transform(image.convert("{mode}"))[None])            # image: a PIL image
names = model.pretrained_cfg["label_names"]
```

**`pretrained=True` is not optional: without it timm builds the same architecture with random weights and
says nothing.**

Input: `[B, {channels}, {height}, {width}]`, pixels in [0, 1] normalised as `(x - mean) / std` with
mean {mean} and std {std}; the transform does it. It resizes by {interpolation} interpolation,
{crop}."""

PROGRAM_USE = """```python
import json, torch

model = torch.export.load("FOLDER/model.pt2").module()   # FOLDER: this one; torch alone is needed
logits = model(images)                                   # any number of images at a time
names = json.load(open("FOLDER/export.json"))["classes"]
```

Input: `[B, {channels}, {height}, {width}]` float32, **pixels in [0, 1], not normalised**: mean {mean} and
std {std} are inside. Images of another size are resized to it first, by {interpolation} interpolation with
antialiasing, {crop}. The program is in eval mode for good, on the CPU: on another device open it as
`torch.export.passes.move_to_device_pass(torch.export.load("FOLDER/model.pt2"), "cuda").module()`.
`model.safetensors` holds the same weights under the module's own names."""

ONNX_USE = """`model.onnx` is the same model: input `images` `[B, {channels}, {height}, {width}]` float32, pixels in
[0, 1], not normalised (mean and std are inside); output `logits`. Its logits differ by up to {apart:.1g}."""


def render(facts: Mapping[str, Any]) -> str:
    """README.md of an export.

    Args:
        facts: what export.json holds, see `bundle.export`.
    """
    about, weights = facts["about"], facts["weights"]
    sections = [
        _front_matter(facts),
        f"# {about['name']}",
        f"An image classifier of {len(facts['classes'])} classes. Weights: {weights['which']}, {weights['dtype']}, "
        f"sha256 of the tensors `{weights['sha256']}`.",
        "## Use\n\n" + _use(facts),
        "## Training\n\n" + training_section(about),
        "## Figures\n\n" + _figures(about["metrics"]),
        "## Classes\n\n" + _classes(facts["classes"]),
        "## Files\n\n" + "\n".join(f"- `{name}`: sha256 `{digest}`" for name, digest in facts["files"].items()),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    lines = ["---", "tags:", "- image-classification", "- distillation"]
    lines += ["- timm", "library_name: timm"] if facts["format"] == "timm" else []
    lines += [f"license: {facts['about']['license']}"] if facts["about"]["license"] else []
    return "\n".join([*lines, "---"])


def _use(facts: Mapping[str, Any]) -> str:
    pixels = facts["preprocessing"]
    channels, height, width = pixels["input_size"]
    crop = "the whole image whatever its shape"
    if pixels["crop_mode"] == "center":
        crop = f"and keeps the middle {pixels['crop_pct']:.1%} of each side"
    numbers = {
        "channels": channels,
        "height": height,
        "width": width,
        "mode": "L" if channels == 1 else "RGB",
        "mean": pixels["mean"],
        "std": pixels["std"],
        "interpolation": pixels["interpolation"],
        "crop": crop,
    }
    text = (TIMM_USE if facts["format"] == "timm" else PROGRAM_USE).format(**numbers)
    if "onnx" in facts["largest_difference"]:
        text += "\n\n" + ONNX_USE.format(**numbers, apart=facts["largest_difference"]["onnx"])
    return text


def _figures(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "None were measured."
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    rows = [
        f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in plain.items()
    ]
    nested = {key: value for key, value in metrics.items() if key not in plain and key != "per_class" and value}
    table = "\n".join(["| figure | value |", "| --- | --- |", *rows]) if rows else ""
    block = f"```json\n{json.dumps(nested, indent=1, ensure_ascii=False, default=str)}\n```" if nested else ""
    return "\n\n".join(filter(None, (table, block)))


def _classes(classes: list[str]) -> str:
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:NAMED]))
    return listed + (f" ... and {len(classes) - NAMED} more, in export.json" if len(classes) > NAMED else "")
