"""Pictures of what generators make, at fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from diffusion.generator import Generator
from visiondistill.eval import evaluating

INK = "#1f2933"
SIDE = 48
"""Smaller images are enlarged, pixel by pixel, until they have so many on a side."""


def sample_grid(
    generator: Generator,
    path: str | Path,
    rows: int = 4,
    columns: int = 8,
    *,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Path:
    """The first samples of a seed as a PNG; videos show their frames side by side.

    Image i is the same in every grid of the seed, whatever the number of rows: grids of a run can
    be laid over each other, and those of teacher and student too.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(_grid(generator, rows, columns, steps, seed, batch_size), path)
    return path


def compare_grids(
    panels: Sequence[tuple[str, Generator, int | None]],
    path: str | Path,
    rows: int = 6,
    columns: int = 6,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Path:
    """Grids of several generators side by side at one seed: a place shows what each makes of the same noise.

    Args:
        panels: title, generator, steps (None for its own).

    Returns:
        The path written.

    Raises:
        ValueError: no panel.
    """
    # The object interface: pyplot would keep the figure alive and choose a backend for the whole process.
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("panels: give at least one (title, generator, steps)")
    grids = [_grid(generator, rows, columns, steps, seed, batch_size) for _, generator, steps in panels]
    height, width = grids[0].shape[1:]
    figure = Figure(
        figsize=(4 * len(panels), 4 * height / width + 0.4), dpi=160, facecolor="white", layout="constrained"
    )
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, grid, (title, _, _) in zip(axes, grids, panels, strict=True):
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold")
        axis.set_axis_off()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _grid(generator: Generator, rows: int, columns: int, steps: int | None, seed: int, batch_size: int) -> Tensor:
    """`[3, H, W]` on the CPU."""
    with evaluating(generator):
        stream = generator.images(rows * columns, batch_size=batch_size, steps=steps, seed=seed)
        images = torch.cat([images for images, _ in stream]).cpu()
    if images.ndim == 5:
        images = images.permute(0, 2, 3, 1, 4).flatten(3)
    times = max(1, -(-SIDE // images.shape[2]))
    enlarged = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0)
