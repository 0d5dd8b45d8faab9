"""Accuracy, likelihood and calibration of a classifier.

Calibration error: Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML
2017, arXiv 1706.04599, equation 3. It stands here rather than coming from torchmetrics, which puts
a confidence of exactly 1 into a bin of its own; the tests hold the two together elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from visiondistill.data import TensorData, in_order
from visiondistill.engine.across import gather_across, process_count, process_index
from visiondistill.models import as_network, evaluating

BINS = 15
CHUNK = 4096
"""Rows whose logits are lifted to float64 at a time."""


@dataclass(frozen=True)
class Scores:
    """What `evaluate` measures.

    Attributes:
        accuracy: share of images whose highest logit is the label's, in [0, 1].
        nll: mean negative log-likelihood of the label, in nats.
        ece: expected calibration error in 15 equal bins of confidence, in [0, 1].
        count: labelled images it was measured on.
        correct: how many of them were answered right.
        top5: share of images whose label is among the five highest logits; None for fewer than
            six classes, where it says nothing.
    """

    accuracy: float
    nll: float
    ece: float
    count: int
    correct: int
    top5: float | None = None


def chance_level(count: int, classes: int) -> float:
    """Accuracy on `count` images up to which a classifier may have guessed."""
    chance = 1 / classes
    noise = 3 * math.sqrt(chance * (1 - chance) / count)
    # With few images even all of them right could be chance: then a classifier must be nearer to all than to chance.
    return min(chance + noise, (1 + chance) / 2)


@dataclass(frozen=True)
class Judged:
    """Labelled images, one row each: `label` and `answer` int64, `nll` and `confidence` float64, all `[N]`."""

    label: Tensor
    answer: Tensor
    nll: Tensor
    confidence: Tensor

    @property
    def right(self) -> Tensor:
        return self.answer == self.label


@dataclass(frozen=True)
class Answers:
    """A classifier's logits for every image of a data set, in the data set's order, on the CPU.

    Attributes:
        logits: `[N, K]`, at least float32.
        label: int64 `[N]`, -1 for images without one.
    """

    logits: Tensor
    label: Tensor

    def labelled(self) -> Answers:
        """The images that have a label.

        Raises:
            ValueError: there is none, or a label that is no class of the classifier.
        """
        keeps = self.label >= 0
        if not keeps.any():
            raise ValueError(f"none of the {len(self.label)} images has a label: there is nothing to measure")
        classes, highest = self.logits.shape[1], int(self.label.max())
        if highest >= classes:
            raise ValueError(
                f"the data have a label {highest}, but the classifier tells {classes} classes apart "
                f"(0 to {classes - 1}): it was made for another set of classes"
            )
        return Answers(self.logits[keeps], self.label[keeps])

    def judge(self, temperature: float = 1.0) -> Judged:
        """Answer, likelihood and confidence of the labelled images, logits being divided by `temperature`."""
        own = self.labelled()
        parts = []
        for logits, label in zip(own.logits.split(CHUNK), own.label.split(CHUNK), strict=True):
            log_p = (logits.double() / temperature).log_softmax(1)
            # From the logits as they are: dividing could round two of them to one value.
            answer = logits.argmax(1, keepdim=True)
            parts.append((answer[:, 0], -log_p.gather(1, label[:, None])[:, 0], log_p.gather(1, answer)[:, 0].exp()))
        answer, nll, confidence = (torch.cat(column) for column in zip(*parts, strict=True))
        return Judged(own.label, answer, nll, confidence)

    def scores(self, temperature: float = 1.0) -> Scores:
        """Scores over the labelled images; accuracies do not depend on `temperature`."""
        own, judged = self.labelled(), self.judge(temperature)
        right = judged.right
        return Scores(
            accuracy=right.double().mean().item(),
            nll=judged.nll.mean().item(),
            ece=calibration_error(judged.confidence, right).item(),
            count=len(right),
            correct=int(right.sum()),
            top5=_among_highest(own, 5) if own.logits.shape[1] > 5 else None,
        )


def evaluate(model: nn.Module, data: Any, batch_size: int = 256, workers: int = 0) -> Scores:
    """Scores of a classifier on a data set.

    Images without a label are left out. Modes are put back and no generator is touched, so that
    looking does not disturb training. With several processes each answers its share and all
    return the scores of the whole.

    Args:
        model: a `Network`, or any classifier of pixels in [0, 1].
        data: as of `data.Stream`.
        batch_size, workers: how it is read; the result does not depend on them.

    Raises:
        ValueError: no image has a label, or as `collect`.
    """
    return collect(model, data, batch_size, workers).scores()


def collect(model: nn.Module, data: Any, batch_size: int = 256, workers: int = 0) -> Answers:
    """A classifier's answer to every image, each exactly once, whatever the number of processes.

    All logits are kept: 4 bytes x images x classes of the host's memory (200 MB for the 50,000
    images and 1,000 classes of ImageNet's validation).

    Args: as of `evaluate`.

    Raises:
        ValueError: logits are not finite, or there are fewer images than processes.
    """
    network = as_network(model)
    share, first, rows = _share(data)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in in_order(share, batch_size, workers):
        with evaluating(network), torch.no_grad():
            logits = network(batch["image"].to(network.scale.device)).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        label = batch.get("label", torch.full((len(logits),), -1))
        columns.append((_kept(logits), _kept(label), _kept(batch["index"] + first)))
    logits, label, index = (
        _gathered(torch.cat(column), rows, network.scale.device) for column in zip(*columns, strict=True)
    )
    if not torch.equal(index, torch.arange(len(data))):
        raise RuntimeError(f"{type(data).__name__} gave {len(index)} images for {len(data)}, or in another order")
    bad = ~logits.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"the logits of {int(bad.sum())} of {len(bad)} images are not finite, the first being number "
            f"{int(bad.nonzero()[0])}: the weights are damaged, or the pixels are not in [0, 1]"
        )
    return Answers(logits, label)


def agreement(model: nn.Module, other: nn.Module, data: Any, batch_size: int = 256, workers: int = 0) -> float:
    """Share of images, labelled or not, on which two classifiers give the same answer."""
    ours, theirs = (collect(each, data, batch_size, workers).logits.argmax(1) for each in (model, other))
    return (ours == theirs).double().mean().item()


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> Tensor:
    """Mean over images of |accuracy - confidence| of their bin; bins `(i/bins, (i+1)/bins]`.

    Args:
        confidence: `[N]` in [0, 1].
        right: bool `[N]`.
    """
    gap = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    gap.index_add_(0, bin_of(confidence, bins), right.to(confidence.dtype) - confidence)
    return gap.abs().sum() / len(confidence)


def bin_of(confidence: Tensor, bins: int = BINS) -> Tensor:
    """int64 `[N]`: the bin `(i/bins, (i+1)/bins]` that each confidence lies in; 0 lies in the first."""
    return (confidence * bins).ceil().long().clamp(1, bins) - 1


def _among_highest(answers: Answers, count: int) -> float:
    parts = zip(answers.logits.split(CHUNK), answers.label.split(CHUNK), strict=True)
    hits = [(logits.topk(count).indices == label[:, None]).any(1) for logits, label in parts]
    return torch.cat(hits).double().mean().item()


def _kept(column: Tensor) -> Tensor:
    return column.detach().cpu()


def _bounds(length: int) -> list[int]:
    """Where each process's contiguous share begins, and the end."""
    return [rank * length // process_count() for rank in range(process_count() + 1)]


def _share(data: Any) -> tuple[Any, int, list[int]]:
    """This process's part of the data, the number of its first image, and the rows of all parts."""
    bounds = _bounds(len(data))
    rows = [high - low for low, high in pairwise(bounds)]
    if min(rows) == 0:
        raise ValueError(f"{type(data).__name__} has {len(data)} images, fewer than the {process_count()} processes")
    low, high = bounds[process_index()], bounds[process_index() + 1]
    if len(rows) == 1:
        return data, 0, rows
    if isinstance(data, TensorData):
        return TensorData({name: column[low:high] for name, column in data.columns.items()}), low, rows
    return Subset(data, range(low, high)), low, rows


def _gathered(own: Tensor, rows: list[int], device: torch.device) -> Tensor:
    """Rows of all processes in order. Shares differ by one row, collectives take equal ones: padded, then cut."""
    if len(rows) == 1:
        return own
    longest = max(rows)
    padded = torch.zeros(longest, *own.shape[1:], dtype=own.dtype, device=device)
    padded[: len(own)] = own.to(device)
    parts = gather_across(padded).cpu().split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])
