"""A share of the training images: stratified, nested, the same for everybody; validation and test untouched."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from distilling import apart, images, net, play, weights
from torch import Tensor, nn

from visiondistill import Distiller, recipes
from visiondistill.data import EmbeddedDigits, OwnData, Pruned, TensorData
from visiondistill.data.pruned import el2n, stratified
from visiondistill.engine.errors import SettingsError
from visiondistill.models import SmallConvNet
from visiondistill.terms import CE, KL
from visiondistill.weighting import Fixed
from visiondistill.workbench import distill


def rows(source) -> set[bytes]:
    return {image.numpy().tobytes() for image in source.train().columns["image"]}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_every_class_keeps_its_share_and_the_rest_stays(fraction: float) -> None:
    whole = EmbeddedDigits()
    pruned = Pruned(whole, fraction)
    counts = whole.describe().splits["train"].per_class
    kept = pruned.describe().splits["train"].per_class
    assert kept == tuple(max(1, round(fraction * count)) for count in counts)
    assert len(pruned.val()) == len(whole.val())
    assert len(pruned.test()) == len(whole.test())
    assert f"{sum(kept)} of {sum(counts)} images are kept (random)" in pruned.describe().notes[-1]


def test_smaller_shares_lie_in_larger_ones_and_depend_on_the_seed_alone() -> None:
    small, large = (rows(Pruned(EmbeddedDigits(), fraction)) for fraction in (0.1, 0.4))
    assert small < large
    assert small == rows(Pruned(EmbeddedDigits(), 0.1))
    assert small != rows(Pruned(EmbeddedDigits(), 0.1, prune_seed=1))


class Told(nn.Module):
    """Sure of the label, as much as the image is bright."""

    num_classes = 3

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3))
        return 10 * bright[:, None] * torch.tensor([1.0, 0.0, 0.0])


def bright(count: int = 30) -> TensorData:
    level = torch.linspace(0.1, 1, count)
    return TensorData({"image": level.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), "label": torch.arange(count) % 3})


def test_scores_are_distances_from_the_label() -> None:
    data = bright()
    logits = Told()(data.columns["image"])
    target = torch.nn.functional.one_hot(data.columns["label"], 3)
    expected = torch.stack([(p - y).square().sum().sqrt() for p, y in zip(logits.softmax(1), target, strict=True)])
    torch.testing.assert_close(el2n(Told(), data, data.columns["label"]), expected)


@pytest.mark.parametrize(("keep", "brightest"), [("easy", True), ("hard", False)])
def test_the_nearest_or_farthest_are_kept(keep: str, brightest: bool) -> None:
    source = Pruned(OwnData(bright(), val_fraction=0, test_fraction=0), 0.5, keep, Told())
    kept = source.train().columns
    # Of class 0 the network is right, the more so the brighter: easy are the bright ones.
    level = kept["image"][kept["label"] == 0].mean((1, 2, 3))
    assert len(level) == 5
    assert (level.min() > 0.55) if brightest else (level.max() < 0.55)


def test_rows_are_the_lowest_of_each_class_in_order() -> None:
    label, rank = torch.tensor([0, 1, 0, 1, 0, -1]), torch.tensor([3.0, 1, 2, 0, 1, 5])
    assert stratified(label, rank, 0.5).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 0.5, "keep": "best"}, "keep must be"),
        ({"fraction": 0.5, "keep": "hard"}, "needs a scorer"),
        ({"fraction": 0.5, "scorer": Told()}, "takes no scorer"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Pruned(EmbeddedDigits(), **arguments)


def test_all_of_the_images_and_no_weight_on_the_teacher_is_plain_training(tmp_path: Path) -> None:
    """f = 1 and alpha = 0, to the bit."""
    source = OwnData(images(), val_fraction=0, test_fraction=0)
    products = []
    for data, teacher, terms, weights_ in (
        (Pruned(source, 1.0), net(6, 9, seed=5), {"ce": CE(), "kd": KL()}, {"ce": 1.0, "kd": 0.0}),
        (source, None, {"ce": CE()}, {}),
    ):
        streams = {"train": data.stream(4)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a teacher is given, but no term")
            method = Distiller(
                teacher, student=net(4, 5), terms=terms, streams=streams, weighting=Fixed(weights_)
            ).double()
        products.append(weights(play(method, tmp_path / str(len(products))).product))
    assert apart(*products) == 0.0
    assert apart(products[0], weights(net(4, 5))) > 0


def test_a_recipe_prunes_its_data(tmp_path: Path) -> None:
    own = {"source": {"class_path": "visiondistill.data.EmbeddedDigits"}, "fraction": 0.2}
    node = {"class_path": "visiondistill.data.Pruned", "init_args": own}
    recipes.check(recipes.override(recipes.load("ce"), {"data": node}))
    settings = {"steps": 20, "run__output_dir": str(tmp_path / "run"), "run__progress": False, "run__device": "cpu"}
    outcome = distill(SmallConvNet([8]), None, Pruned(EmbeddedDigits(), 0.2), recipe="ce", **settings)
    assert outcome.facts.data.splits["train"].used == len(Pruned(EmbeddedDigits(), 0.2).train())
