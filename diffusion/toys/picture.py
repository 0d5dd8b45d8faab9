"""Pictures of the toy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from diffusion.toys.metrics import NEAR
from diffusion.toys.mixture import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, FRAME = "#1f2933", "#7b8794", "#d9dee4"
COLOURS = ("#334e68", "#0f766e", "#c2410c")
SHOWN = 3000
LIMIT = 1.02


def draw_ring(panels: dict[str, tuple[Tensor, str]], mixture: GaussianMixture, path: Path | str) -> Path:
    """One scatter per panel, side by side on equal axes; circles show what counts as on a mode.

    Args:
        panels: title -> (samples `[N, 2]`, caption).
        mixture: its modes are circled in every panel.
        path: of the PNG.

    Returns:
        The path written.
    """
    # The object interface: pyplot would keep the figure alive and choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * len(panels), 5.0), dpi=160, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for index, (title, (samples, caption)) in enumerate(panels.items()):
        _circle(axes[index], mixture)
        _scatter(axes[index], samples, COLOURS[index % len(COLOURS)])
        axes[index].set_title(title, loc="left", fontsize=13, color=INK, pad=9, fontweight="bold")
        axes[index].set_xlabel(caption, loc="left", fontsize=10, color=INK, labelpad=9, linespacing=1.45)
    path = Path(path)
    figure.savefig(path)
    return path


def _scatter(axis: Axes, samples: Tensor, colour: str) -> None:
    points = samples[:SHOWN].detach().cpu()
    axis.scatter(points[:, 0], points[:, 1], s=5, alpha=0.3, color=colour, linewidths=0)
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_color(FRAME)


def _circle(axis: Axes, mixture: GaussianMixture) -> None:
    from matplotlib.patches import Circle

    for centre in mixture.means.tolist():
        axis.add_patch(Circle(centre, NEAR * mixture.std, fill=False, edgecolor=FAINT, linewidth=0.7))
