"""Pictures of samples: equal seeds, equal places."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from diffusion.eval import compare_grids, sample_grid
from diffusion.generator import Generator

Make = Callable[..., Generator]


def cells(path: Path, times: int, side: int, rows: int, columns: int) -> Tensor:
    """`[rows * columns, side, side]`, uint8: one pixel of each enlarged one."""
    image = decode_image(str(path), ImageReadMode.GRAY)[0]
    step = side * times + 2
    corners = [(2 + row * step, 2 + column * step) for row in range(rows) for column in range(columns)]
    return torch.stack([image[y : y + side * times : times, x : x + side * times : times] for y, x in corners])


def test_a_grid_shows_the_samples_of_its_seed(make_generator: Make, tmp_path: Path):
    generator = make_generator().train()
    path = sample_grid(generator, tmp_path / "new" / "grid.png", 2, 5, seed=3, batch_size=4)
    assert generator.training
    generator.eval()
    expected = torch.cat([images for images, _ in generator.images(10, seed=3)])
    shown = cells(path, times=6, side=8, rows=2, columns=5)
    torch.testing.assert_close(shown, (expected[:, 0] * 255).round().to(torch.uint8), rtol=0, atol=1)


def test_a_place_is_the_same_sample_in_every_grid(make_generator: Make, tmp_path: Path):
    small = sample_grid(make_generator(), tmp_path / "small.png", 1, 5)
    tall = sample_grid(make_generator(), tmp_path / "tall.png", 3, 5)
    assert torch.equal(cells(small, 6, 8, 1, 5), cells(tall, 6, 8, 3, 5)[:5])
    other = sample_grid(make_generator(), tmp_path / "other.png", 1, 5, seed=1)
    assert not torch.equal(cells(small, 6, 8, 1, 5), cells(other, 6, 8, 1, 5))


def test_videos_show_their_frames_side_by_side(make_generator: Make, tmp_path: Path):
    generator = make_generator(shape=(3, 1, 8, 8)).eval()
    image = decode_image(str(sample_grid(generator, tmp_path / "video.png", 1, 2)), ImageReadMode.GRAY)[0]
    (video, _), *_ = generator.images(2)
    assert image.shape == (8 * 6 + 4, 2 * 24 * 6 + 6)
    expected = (torch.cat(list(video[0, :, 0]), 1) * 255).round().to(torch.uint8)
    torch.testing.assert_close(image[2:50:6, 2:146:6], expected, rtol=0, atol=1)


def test_generators_stand_side_by_side_without_pyplot(make_generator: Make, tmp_path: Path):
    before = "matplotlib.pyplot" in sys.modules
    panels = [("teacher", make_generator(), 18), ("student", make_generator(0.0), None)]
    path = compare_grids(panels, tmp_path / "both.png", 2, 3)
    image = decode_image(str(path))
    assert image.shape[2] > 1.5 * image.shape[1]
    assert ("matplotlib.pyplot" in sys.modules) == before
    with pytest.raises(ValueError, match="panels"):
        compare_grids([], tmp_path / "none.png")
