"""A share of a set's training images.

Ben-Baruch, Botach, Kviatkovsky, Aggarwal, Medioni: Distilling the Knowledge in Data Pruning, arXiv 2403.07854:
with a teacher a random share does about as well as a chosen one. A reconstruction: no official code was found.
Scores: Paul, Ganguli, Dziugaite: Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075 (EL2N).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from visiondistill.data.source import TRAIN, Source
from visiondistill.data.stream import in_order
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import key

Keep = Literal["random", "easy", "hard"]
SCORED_AT_ONCE = 256


class Pruned(Source):
    """Another source with fewer training images, the same share of every class; validation and test stay whole.

    Of a class with `n` training images `max(1, round(fraction * n))` are kept; images without a
    label count as a class of their own. Which ones depends on `prune_seed` or the scores alone, so
    that all arms of a comparison have the same ones, and a smaller fraction's are among a larger one's.

    Args:
        source: the whole set.
        fraction: share that is kept, in (0, 1].
        keep: "random", or by how far a network's probabilities are from the label, in Euclidean norm:
            the nearest ("easy") or farthest ("hard").
        scorer: that network, a classifier of pixels in [0, 1].
        prune_seed: of the random choice.

    Raises:
        SettingsError: a fraction outside (0, 1], or a score without a scorer.
    """

    def __init__(
        self,
        source: Source,
        fraction: float,
        keep: Keep = "random",
        scorer: nn.Module | None = None,
        prune_seed: int = 0,
    ) -> None:
        if not 0 < fraction <= 1:
            raise SettingsError(f"fraction must be in (0, 1], got {fraction}")
        if keep not in ("random", "easy", "hard"):
            raise SettingsError(f"keep must be 'random', 'easy' or 'hard', got {keep!r}")
        if (keep == "random") != (scorer is None):
            raise SettingsError(f"keep={keep!r} {'needs a' if scorer is None else 'takes no'} scorer")
        whole = source.split(TRAIN)
        rank = _random(len(whole.label), prune_seed) if scorer is None else el2n(scorer, whole.data, whole.label)
        kept = stratified(whole.label, -rank if keep == "hard" else rank, fraction)
        notes = [f"train: {len(kept)} of {len(whole.label)} images are kept ({keep})"]
        splits = {name: source.split(name) for name in source.splits} | {TRAIN: whole.select(kept)}
        self._source = source
        super().__init__(splits, source.classes, source.input_size, 0, 0, 0, source.train_view, notes)

    @property
    def crop(self) -> dict[str, Any]:
        return self._source.crop

    @property
    def _how(self) -> str:
        return self._source._how


def stratified(label: Tensor, rank: Tensor, fraction: float) -> Tensor:
    """Rows `[M]`, in order, of the lowest `rank` `[N]` within each class of `label` int64 `[N]`."""
    kept = []
    for number in label.unique():
        rows = (label == number).nonzero()[:, 0]
        count = max(1, round(fraction * len(rows)))
        kept.append(rows[rank[rows].argsort(stable=True)[:count]])
    return torch.cat(kept).sort().values


@torch.no_grad()
def el2n(network: nn.Module, data: Any, label: Tensor) -> Tensor:
    """`|softmax(logits) - onehot(label)|` of every image, `[N]`; 2, more than any other, for images without a label.

    Args:
        network: classifier of pixels in [0, 1]; used in eval mode, its modes are put back.
        data: as of `Stream`.
        label: int64 `[N]`, -1 for none.
    """
    from visiondistill.models.network import as_network, evaluating

    device = next(iter(network.parameters()), torch.empty(0)).device
    with evaluating(network):
        answers = [as_network(network)(batch["image"].to(device)).logits for batch in in_order(data, SCORED_AT_ONCE)]
    logits = torch.cat(answers).cpu().float()
    target = one_hot(label.clamp(min=0), logits.shape[1])
    distance = (logits.softmax(1) - target).norm(dim=1)
    return torch.where(label >= 0, distance, 2.0)


def _random(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(key("prune", seed))).double()
