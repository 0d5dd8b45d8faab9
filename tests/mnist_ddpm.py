"""A published model of handwritten digits (MNIST), its own class, and the images that it was trained on."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.models import Custom, vp
from diffusion.process import VPProcess

SHAPE = (1, 28, 28)


def published(shared_dir: Path) -> Custom:
    """A teacher with the published weights; it knows no classes."""
    weights = shared_dir / "data/weights/mnist_ddpm/ddpm_mnist.pth"
    return Custom(Talberg(), SHAPE, published_path(), "eps", 0.001, -0.5, 0.5, weights=str(weights))


def published_path() -> VPProcess:
    """What it was trained on."""
    return vp("linear", 1e-4, 0.02, 1001)


def digits(shared_dir: Path, count: int | None = None) -> Tensor:
    """The first test images, uint8 `[N, 1, 28, 28]`."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(next((shared_dir / "data/mnist").glob("test*.parquet"))).slice(0, count)
    pixels = [np.asarray(Image.open(BytesIO(row["image"]["bytes"]))) for row in table.to_pylist()]
    return torch.from_numpy(np.stack(pixels))[:, None]


class Talberg(nn.Module):
    """The published MNIST model's own class: `gt` is its network, beside its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.gt = nn.Module()
        self.gt.register_buffer("frequencies", torch.zeros(16))
        widths = (1, 16, 32, 32, 16)
        blocks = []
        for inner, outer in pairwise(widths):
            block = nn.Module()
            block.net = nn.Sequential(nn.Conv2d(inner, outer, 7, padding=3), nn.LayerNorm((outer, 28, 28)), nn.GELU())
            blocks.append(block)
        self.gt.blocks = nn.ModuleList([*blocks, nn.Conv2d(16, 1, 3, padding=1)])
        layers = [nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()]
        self.gt.time_embed = nn.Sequential(*layers, nn.Linear(128, 16))
        self.register_buffer("beta_t", torch.zeros(1001))
        self.register_buffer("alpha_t", torch.zeros(1001))

    def forward(self, x, t):
        angle = t[:, None] * self.gt.frequencies
        code = self.gt.time_embed(torch.cat([angle.sin(), angle.cos() - 1], 1))[:, :, None, None]
        x = self.gt.blocks[0].net(x) + code
        for block in self.gt.blocks[1:-1]:
            x = block.net(x)
        return self.gt.blocks[-1](x)
