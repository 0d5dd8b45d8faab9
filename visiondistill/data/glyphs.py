"""Ten blocky signs on a dark canvas, made up from a seed: to see what a student learns beyond its training images."""

from __future__ import annotations

import torch
from torch import Tensor

from visiondistill.data.own import split_of
from visiondistill.data.source import Source
from visiondistill.data.tensors import TensorData
from visiondistill.engine.rng import key

CANVAS, SIDE = 20, 8
"""Pixels a side, of the image and of the sign in it."""
MARGIN = (CANVAS - SIDE) // 2
"""Pixels between a centred sign and the edge: the greatest shift that leaves the sign whole."""
SHAPES = (
    "###/#.#/###",
    "#../##./.#.",
    "##./..#/##.",
    "#.#/###/..#",
    "###/#../.##",
    "#../###/#.#",
    "#.#/.#./#.#",
    ".#./###/.#.",
    "..#/.#./#..",
    "###/..#/..#",
)
"""The signs, in cells; one per class."""
MISSING, DARKEST, NOISE = 0.05, 0.5, 0.15
"""Share of cells that are missing, least brightness, and standard deviation of the noise."""


class Glyphs(Source):
    """20x20 grey images of ten signs, centred to within half a pixel; test images can be shifted.

    Signs differ in brightness from image to image, a share of their cells is missing, and there is
    smooth noise. The images are a pure function of the arguments; training, validation and test
    images are drawn apart.

    Args:
        train, val, test: numbers of images, the same for every class up to one.
        test_shift: test images are shifted to the right and down by whole pixels, uniform in
            [-test_shift, test_shift]; at most 6.
        seed: which images.
    """

    def __init__(self, train: int = 2000, val: int = 500, test: int = 2000, test_shift: int = 0, seed: int = 0) -> None:
        counts = {"train": train, "val": val, "test": test}
        sets = {
            name: glyphs(count, test_shift if name == "test" else 0, key("glyphs", name, seed))
            for name, count in counts.items()
        }
        names = [str(number) for number in range(len(SHAPES))]
        super().__init__({name: split_of(data) for name, data in sets.items()}, names, (1, CANVAS, CANVAS))


def glyphs(count: int, shift: int = 0, seed: int = 0) -> TensorData:
    """`count` images, classes in turn, shifted as test images of `Glyphs` are.

    Raises:
        ValueError: count < 1 or shift outside [0, 6].
    """
    if count < 1 or not 0 <= shift <= MARGIN:
        raise ValueError(f"need count >= 1 and shift in [0, {MARGIN}], got {count} and {shift}")
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % len(SHAPES)
    cells = _templates()[label]
    there = torch.rand(cells.shape, generator=generator) >= MISSING
    sign = torch.nn.functional.interpolate((cells * there)[:, None], (SIDE, SIDE), mode="bilinear", align_corners=True)
    bright = DARKEST + (1 - DARKEST) * torch.rand(count, 1, 1, 1, generator=generator)
    by = torch.randint(-shift, shift + 1, (count, 2), generator=generator)
    sign = _nudged(bright * sign, generator)
    # One pixel more on each side for what a nudge takes there.
    image = torch.zeros(count, CANVAS + 2, CANVAS + 2)
    inside = torch.arange(SIDE + 2) + MARGIN
    each = torch.arange(count)[:, None, None]
    rows, columns = inside + by[:, :1], inside + by[:, 1:]
    image[each, rows[:, :, None], columns[:, None, :]] = sign[:, 0]
    image = image[:, None, 1:-1, 1:-1] + _noise(count, generator)
    return TensorData({"image": image.clamp(0, 1), "label": label})


def _nudged(sign: Tensor, generator: torch.Generator) -> Tensor:
    """Signs moved by up to half a pixel, with a margin of one: on the grid they would be sharper than shifted ones."""
    padded = torch.nn.functional.pad(sign, (1, 1, 1, 1))
    maps = torch.eye(2, 3).repeat(len(sign), 1, 1)
    maps[:, :, 2] = (2 * torch.rand(len(sign), 2, generator=generator) - 1) / padded.shape[-1]
    grid = torch.nn.functional.affine_grid(maps, list(padded.shape), align_corners=False)
    return torch.nn.functional.grid_sample(padded, grid, align_corners=False)


def _noise(count: int, generator: torch.Generator) -> Tensor:
    """Smooth, as photographs are: moving an image by half a pixel would wipe out white noise."""
    white = torch.randn(count, 1, CANVAS + 4, CANVAS + 4, generator=generator)
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = kernel[:, None] * kernel
    return NOISE * torch.nn.functional.conv2d(white, (kernel / kernel.norm())[None, None])


def _templates() -> Tensor:
    """`[10, 3, 3]` of 0 and 1."""
    rows = [[[float(cell == "#") for cell in row] for row in shape.split("/")] for shape in SHAPES]
    return torch.tensor(rows)
