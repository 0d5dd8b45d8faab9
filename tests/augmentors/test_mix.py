from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from visiondistill.augmentors import Augment, Chain, Mix
from visiondistill.augmentors.mix import beta
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import Draw
from visiondistill.models import Network, SmallConvNet

CLASSES = 5


def draw(low: int = 0, high: int = 8, seed: int = 0, block: int = 2) -> Draw:
    return Draw(seed, 0, {"": (low, high), "train": (low, high)}, block, torch.device("cpu"))


def batch(count: int = 8, height: int = 6, width: int = 9) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(count, 3, height, width, generator=generator)
    label = torch.randint(CLASSES, (count,), generator=generator)
    return {"image": image, "label": label, "index": torch.arange(count)}


def mixed(mix: Mix, data: dict, randomness: Draw) -> dict:
    return mix.prepare({"train": data, "val": {}}, randomness, frozenset({"student"}))["train"]


def one_hot(label: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(label, CLASSES).float()


def test_mixup_blends_neighbours_and_their_labels_by_one_share():
    data = batch()
    out = mixed(Mix(CLASSES, mixup=1.0, cutmix=0), data, draw())
    share, partner = out["mix"]["share"], out["mix"]["partner"]
    assert partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    wide = share[:, None, None, None]
    expected = wide * data["image"] + (1 - wide) * data["image"][partner]
    torch.testing.assert_close(out["image"], expected, rtol=0, atol=1e-6)
    soft = share[:, None] * one_hot(data["label"]) + (1 - share[:, None]) * one_hot(data["label"][partner])
    torch.testing.assert_close(out["target"], soft)
    assert len(set(share.tolist())) == 8


def test_cutmix_takes_a_box_of_the_partner_and_its_share_of_the_label():
    data = batch(64, 16, 12)
    out = mixed(Mix(CLASSES, mixup=0, cutmix=1.0), data, draw(0, 64))
    partner = data["image"][out["mix"]["partner"]]
    own, other = (out["image"] == data["image"]).all(1), (out["image"] == partner).all(1)
    assert (own ^ other).all()
    torch.testing.assert_close(out["mix"]["share"], own.float().mean((-2, -1)))
    torch.testing.assert_close(out["target"].sum(1), torch.ones(64))
    for cut in other[other.flatten(1).any(1)]:
        rows, columns = cut.any(1), cut.any(0)
        assert torch.equal(cut, rows[:, None] & columns[None, :])
        assert rows.nonzero().diff(dim=0).eq(1).all()
        assert columns.nonzero().diff(dim=0).eq(1).all()


def test_the_hard_label_is_gone_and_the_rest_stays():
    data = batch()
    out = mixed(Mix(CLASSES), data, draw())
    assert set(out) == {"image", "index", "target", "mix"}
    assert torch.equal(out["mix"]["label"], data["label"])
    assert torch.equal(out["mix"]["partner_label"], data["label"][out["mix"]["partner"]])
    assert "label" in data


def test_every_split_of_the_batch_gives_the_same():
    data = batch()
    whole = mixed(Mix(CLASSES), data, draw())
    for low in range(0, 8, 4):
        part = mixed(Mix(CLASSES), {name: t[low : low + 4] for name, t in data.items()}, draw(low, low + 4))
        for name in ("image", "target"):
            assert torch.equal(part[name], whole[name][low : low + 4])


def test_an_image_without_a_label_adds_no_mass():
    data = batch(2) | {"label": torch.tensor([3, -1])}
    out = mixed(Mix(CLASSES, mixup=1.0, cutmix=0), data, draw(0, 2))
    share = out["mix"]["share"]
    torch.testing.assert_close(out["target"].sum(1), torch.stack([share[0], 1 - share[1]]))
    assert (out["target"][:, [0, 1, 2, 4]] == 0).all()
    bare = {"image": data["image"]}
    assert (mixed(Mix(CLASSES), bare, draw(0, 2))["target"] == 0).all()


def test_rows_are_mixed_and_cut_as_often_as_asked():
    count = 2000
    data = batch(count, 8, 8)
    out = mixed(Mix(CLASSES, mixup=1.0, cutmix=1.0, switch=0.25, probability=0.8), data, draw(0, count, block=8))
    partner = data["image"][out["mix"]["partner"]]
    still = (out["image"] == data["image"]).flatten(1).all(1)
    whole = (out["image"] == partner).flatten(1).all(1)
    pieces = ((out["image"] == data["image"]) | (out["image"] == partner)).flatten(1).all(1) & ~still & ~whole
    blended = (~still & ~whole & ~pieces).double().mean().item()
    assert abs(blended - 0.8 * 0.75) < 4 * math.sqrt(0.6 * 0.4 / count)
    # A box may be empty after rounding: a few cut rows are whole.
    assert 0.8 * 0.25 - 0.06 < pieces.double().mean().item() < 0.8 * 0.25 + 0.04
    assert (out["mix"]["share"][still] == 1).all()


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha: float):
    count = 20_000
    drawn = beta(alpha, draw(0, count, block=1000), "share").double()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert abs(drawn.mean().item() - 0.5) < 5 * math.sqrt(1 / (4 * (2 * alpha + 1)) / count)
    # The distribution function, by a numerical integral of the density in a variable without poles.
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    x = torch.where(u < 0.5, (2 * u) ** (1 / alpha) / 2, 1 - (2 - 2 * u) ** (1 / alpha) / 2)
    exact = torch.cumulative_trapezoid(torch.maximum(x, 1 - x) ** (alpha - 1), u)
    exact = torch.cat([torch.zeros(1, dtype=torch.float64), exact / exact[-1]])
    # The lower half: above it float32 rounds shares near 1. That the halves are alike is the mean above and this.
    assert abs((drawn < 0.1).double().mean() - (drawn > 0.9).double().mean()) < 5 * math.sqrt(1 / count)
    for quantile in (0.02, 0.05, 0.2, 0.35, 0.5):
        at = x[torch.searchsorted(exact, quantile)]
        assert abs((drawn <= at).double().mean().item() - quantile) < 5 * math.sqrt(0.25 / count), (alpha, quantile)


def test_autocast_does_not_round_the_pixels():
    data = batch()
    plain = mixed(Mix(CLASSES), data, draw())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed(Mix(CLASSES), data, draw())["image"], plain["image"])


def test_odd_micro_batches_are_refused():
    with pytest.raises(SettingsError, match=r"which has 3.*even"):
        mixed(Mix(CLASSES), batch(3), draw(0, 3, block=1))


def test_labels_of_other_classes_than_the_students_are_refused():
    network = Network(SmallConvNet([4], "batch", num_classes=7), input_size=(1, 8, 8))
    for mix in (Mix(CLASSES), Chain([Augment(), Mix(CLASSES)])):
        with pytest.raises(SettingsError, match=r"labels of 5 classes, .* 7 apart: set num_classes: 7"):
            mix.connect(network, None)
    Mix(7).connect(network, None)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mixup": -1.0}, "mixup"),
        ({"cutmix": math.inf}, "cutmix"),
        ({"switch": 2.0}, "switch"),
        ({"probability": -0.1}, "probability"),
        ({"num_classes": 0}, "num_classes"),
        ({"mixup": 0, "cutmix": 0}, "nothing to mix"),
        ({"probability": 0.0}, "nothing to mix"),
    ],
)
def test_wrong_numbers_are_named(wrong: dict, named: str):
    with pytest.raises(SettingsError, match=named):
        Mix(**({"num_classes": CLASSES} | wrong))
