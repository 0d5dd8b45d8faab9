"""Distances between two sets of points: features of images, or the points of a toy themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.eval.features import Statistics

ROWS = 1024
"""Rows of a matrix of pairwise distances that are held at a time."""


class Kernel(NamedTuple):
    """A kernel distance.

    Attributes:
        mean: over the subsets.
        spread: their standard deviation (of the population, as KID is published); 0 for one subset.
    """

    mean: float
    spread: float


class Coverage(NamedTuple):
    """Precision and recall, both in [0, 1].

    Attributes:
        precision: share of the samples that lie where real images are.
        recall: share of the real images that lie where samples are.
    """

    precision: float
    recall: float


def frechet_distance(x: Statistics, y: Statistics) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)): W2^2 between the Gaussians of equal moments.

    Source: Heusel et al. 2017, eq. 6. The trace is the sum of the singular values of
    C_x^(1/2) C_y^(1/2), which keeps its digits where there are fewer images than features. It is
    biased upwards by the numbers of images: compare at equal ones.

    Raises:
        ValueError: features of unequal length.
    """
    _same_width(x.total, y.total)
    cross = torch.linalg.svdvals(_root(x.covariance) @ _root(y.covariance)).sum()
    spread = x.covariance.trace() + y.covariance.trace() - 2 * cross
    return max(0.0, float((x.mean - y.mean).square().sum() + spread))


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> Kernel:
    """Unbiased MMD^2 with the kernel (x . y / D + 1)^3, of random subsets: 0 in the mean for equal laws.

    Source: Binkowski et al. 2018, eq. 4 and section 4 (KID).

    Args:
        x: `[N, D]`; `y` `[M, D]`.
        size: of the subsets, drawn without repetition; N and M bound it.

    Raises:
        ValueError: features of unequal length, or fewer than 2 rows.
    """
    _same_width(x, y)
    size = min(size, len(x), len(y))
    if size < 2 or subsets < 1:
        raise ValueError(f"need subsets >= 1 of size >= 2, got {subsets} of {size} ({len(x)} and {len(y)} rows)")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a, b = (each[torch.randperm(len(each), generator=generator)[:size]] for each in (x, y))
        within = (_kernel(a, a) + _kernel(b, b)).fill_diagonal_(0).sum() / (size * (size - 1))
        values.append(within - 2 * _kernel(a, b).mean())
    found = torch.stack(values)
    return Kernel(float(found.mean()), float(found.std(correction=0)))


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> Coverage:
    """Share of each set that lies within the balls around the other set's points, up to their k-th neighbours.

    Source: Kynkaanniemi et al. 2019, eq. 1 and 2.

    Args:
        x: samples `[N, D]`.
        y: real `[M, D]`.

    Raises:
        ValueError: features of unequal length, or no k neighbours.
    """
    _same_width(x, y)
    if k < 1 or min(len(x), len(y)) <= k:
        raise ValueError(f"k={k} needs k >= 1 and more than k rows, got {len(x)} and {len(y)}")
    return Coverage(_within(x, y, k), _within(y, x, k))


def mean_distance(x: Tensor, label: Tensor | None = None) -> float | None:
    """Mean Euclidean distance of distinct pairs `[N, D]`: how much the points differ among themselves.

    Args:
        label: int64 `[N]`, -1 for none: only pairs of one label count.

    Returns:
        None where there is no pair.
    """
    groups = [x] if label is None else [x[label == each] for each in label.unique() if each >= 0]
    total = sum(rows.sum() for group in groups for rows in _distances(group, group))
    pairs = sum(len(group) * (len(group) - 1) for group in groups)
    return float(total / pairs) if pairs else None


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2E|x - y| - E|x - x'| - E|y - y'| over distinct pairs: unbiased, 0 for equal laws (so it may be negative).

    Source: Szekely and Rizzo 2013.

    Args:
        x: `[N, D]` of few dimensions; `y` `[M, D]`.

    Raises:
        ValueError: points of unequal dimension, or fewer than 2 rows.
    """
    _same_width(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"need at least 2 rows on either side, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    # By differences: by products, points that lie close together away from the origin would lose their distances.
    across = [torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").sum() for rows in x.split(ROWS)]
    return float(2 * sum(across) / (len(x) * len(y)) - torch.pdist(x).mean() - torch.pdist(y).mean())


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Root of the mean squared 1-D W2 over random directions: 0 for equal sets, biased upwards by their sizes.

    Source: Bonneel et al. 2015. Each 1-D distance is exact, by the quantile functions of the two
    sets, also where they differ in size. Directions depend on the seed alone.

    Args:
        x: `[N, D]`; `y` `[M, D]`.

    Raises:
        ValueError: points of unequal dimension.
    """
    _same_width(x, y)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    u, v = ((each.double() @ directions).sort(0).values for each in (x, y))
    n, m = len(u), len(v)
    # Both quantile functions are constant between multiples of 1 / n and 1 / m: whole numbers of 1 / (n m).
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values.to(x.device)
    widths = ends.diff(prepend=ends.new_zeros(1))
    squared = (u[(ends - 1) // m] - v[(ends - 1) // n]).square()
    return float((widths[:, None] * squared).sum(0).mean() / (n * m)) ** 0.5


def _root(covariance: Tensor) -> Tensor:
    """Symmetric root; what rounding leaves of zero eigenvalues would else count as its own root."""
    values, vectors = torch.linalg.eigh(covariance)
    least = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return vectors * values.where(values > least, 0).sqrt() @ vectors.T


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    # Rounded products of single precision average out; sums of their cubes would not.
    return ((a @ b.T).double() / a.shape[1] + 1) ** 3


def _within(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of the points that lie in at least one ball."""
    # Equal points seem apart by the rounding of products, less than by that of the features themselves.
    slack = torch.finfo(torch.float32).eps * centres.norm(dim=1).max()
    # The nearest neighbour of a point is itself.
    radius = torch.cat([rows.kthvalue(k + 1).values for rows in _distances(centres, centres)])
    inside = [(rows <= radius + slack).any(1) for rows in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """`[<= ROWS, M]` at a time, in float64: single precision cannot tell near points from equal ones."""
    y = y.double()
    return (torch.cdist(part.double(), y) for part in x.split(ROWS))


def _same_width(x: Tensor, y: Tensor) -> None:
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"both sets need features of one length, got {x.shape[-1]} and {y.shape[-1]}")
