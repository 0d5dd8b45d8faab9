"""Temperature scaling, and the table behind a reliability diagram.

Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visiondistill.eval.classify import BINS, CHUNK, Answers, Judged, bin_of

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures beyond these mean that the answers are all right, or hold no information."""


@dataclass(frozen=True)
class Bins:
    """Images by confidence, in equal bins `(i/n, (i+1)/n]`.

    Attributes:
        count: int64 `[n]`, images in each bin.
        accuracy, confidence: float64 `[n]`, means over its images; nan for an empty bin.
    """

    count: Tensor
    accuracy: Tensor
    confidence: Tensor


def reliability(judged: Judged, bins: int = BINS) -> Bins:
    """The bins of the calibration error, with what is in them."""
    place = bin_of(judged.confidence, bins)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums.index_add_(1, place, torch.stack([judged.right.double(), judged.confidence]))
    count = place.bincount(minlength=bins)
    return Bins(count, *(sums / count))


def fit_temperature(answers: Answers) -> float:
    """The temperature in [0.05, 20] that makes the labels of these answers most likely.

    The likelihood is log-concave in 1 / temperature, so its one stationary point is bracketed and
    found by Newton's steps, with bisection where a step would leave the bracket.

    Args:
        answers: to *validation* images. Fitted on the test set, calibration would flatter.

    Raises:
        ValueError: as `Answers.labelled`.
    """
    own = answers.labelled()
    low, high, sharpness = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(100):
        slope, curvature = _derivatives(own, sharpness)
        low, high = (sharpness, high) if slope < 0 else (low, sharpness)
        step = sharpness - slope / curvature if curvature > 0 else low - 1
        new = step if low < step < high else (low + high) / 2
        if abs(new - sharpness) <= 1e-9 * sharpness:
            break
        sharpness = new
    return 1 / sharpness


def _derivatives(answers: Answers, sharpness: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood of `sharpness * logits`."""
    slope = curvature = 0.0
    for logits, label in zip(answers.logits.split(CHUNK), answers.label.split(CHUNK), strict=True):
        z = logits.double()
        p = (sharpness * z).softmax(1)
        mean = (p * z).sum(1)
        slope += (mean - z.gather(1, label[:, None])[:, 0]).sum().item()
        curvature += (p * (z - mean[:, None]) ** 2).sum().item()
    return slope / len(answers.label), curvature / len(answers.label)
