"""Pictures of learned edits."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from visiondistill.augmentors.edits import Edit
from visiondistill.engine.rng import Draw


@runtime_checkable
class Draws(Protocol):
    """A part that can show what it has learned."""

    def draw(self, images: Tensor, folder: Path) -> None:
        """Write pictures of images `[B, C, H, W]` in [0, 1], B even, into a folder that is there."""
        ...


@torch.no_grad()
def edited(edit: Edit, images: Tensor, seed: int = 0, step: int = 0) -> Tensor:
    """`images` `[B, C, H, W]` as the edit changes them; the partner of a row is its neighbour, B even."""
    draw = Draw(seed, step, {"": (0, len(images))}, len(images), images.device, images.dtype)
    neighbour = torch.arange(len(images), device=images.device) ^ 1
    return edit(edit.encode(images), edit.noise(images, draw, "picture"), images[neighbour])[0]


def draw_edits(edit: Edit, images: Tensor, path: Path, answers: int = 3, seed: int = 0) -> None:
    """A PNG with a column for each image: itself on top, below it `answers` of the edit.

    Images of neither one nor three channels are shown as the mean of theirs.
    """
    from matplotlib.figure import Figure

    rows = [images] + [edited(edit, images, seed, step) for step in range(answers)]
    if images.shape[1] not in (1, 3):
        rows = [row.mean(1, keepdim=True) for row in rows]
    height, width = images.shape[-2:]
    # Gaps of a pixel between images.
    gap = torch.nn.functional.pad(torch.stack(rows), (0, 1, 0, 1), value=1.0).cpu()
    sheet = gap.permute(0, 3, 1, 4, 2).reshape(len(rows) * (height + 1), len(images) * (width + 1), -1)
    inches = (0.6 * len(images), 0.6 * len(rows) + 0.3)
    figure = Figure(figsize=inches, dpi=max(100, 2 * width), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet.float().expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set_yticks(
        [(height + 1) * (row + 0.5) for row in range(len(rows))],
        ["image"] + ["edited"] * answers,
        fontsize=7,
    )
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path)
