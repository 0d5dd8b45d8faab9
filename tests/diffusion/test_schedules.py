"""Schedules and partitions: their defining properties, and official values where there are any."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusion.schedules import couple_, disback_index, ema_decay, msd_student_index


def load(folder, name):
    return torch.load(folder / "reference_values" / "dmd" / f"{name}.pt", weights_only=True)


def test_disback_walks_down_to_the_teacher_and_stays():
    path = [disback_index(i, 4, 10) for i in range(60)]
    assert path[0] == 3, "never the critic's own start, whose difference would be 0"
    assert [path.count(k) for k in (3, 2, 1)] == [10, 10, 10]
    assert set(path[30:]) == {0}
    assert disback_index(5, 0, 10) == 0, "no path at all is the host method"
    with pytest.raises(ValueError, match="interval"):
        disback_index(0, 1, 0)


def test_disback_reference(shared_dir):
    for row in load(shared_dir, "derived_disback_schedule")["rows"]:
        got = [disback_index(i, row["M"], row["interval"]) for i in row["iterations"]]
        assert got == row["checkpoint_index"]


@pytest.mark.parametrize(("students", "classes"), [(1, 5), (3, 7), (4, 8), (7, 7)])
def test_msd_blocks_are_consecutive_covering_and_even(students, classes):
    owner = msd_student_index(torch.arange(classes), students, classes)
    assert (owner.diff() >= 0).all()
    sizes = torch.bincount(owner)
    assert len(sizes) == students
    assert sizes.max() - sizes.min() <= 1
    assert msd_student_index(classes - 1, students, classes) == students - 1


def test_msd_takes_labels_of_8_bits():
    assert msd_student_index(torch.tensor([0, 128, 255], dtype=torch.uint8), 4, 256).tolist() == [0, 2, 3]


def test_msd_reference(shared_dir):
    for students, expected in load(shared_dir, "derived_msd_partition")["imagenet_consecutive"].items():
        assert torch.equal(msd_student_index(torch.arange(1000), int(students), 1000), expected)


def test_more_students_than_classes_are_refused():
    with pytest.raises(ValueError, match="num_students=3"):
        msd_student_index(0, 3, 2)


def test_coupling_moves_the_target_in_place_and_leaves_no_graph():
    torch.manual_seed(0)
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    before, parameter = copy.deepcopy(target), target.weight
    couple_(target, source, 0.75)
    assert target.weight is parameter
    assert target.weight.grad_fn is None
    torch.testing.assert_close(target.weight, 0.75 * before.weight + 0.25 * source.weight)
    torch.testing.assert_close(target.bias, 0.75 * before.bias + 0.25 * source.bias)
    couple_(target, source, 0.0)
    assert torch.equal(target.weight, source.weight)
    kept = copy.deepcopy(source)
    couple_(source, before, 1.0)
    assert torch.equal(source.weight, kept.weight)


@pytest.mark.parametrize("other", [nn.Linear(3, 4), nn.Linear(3, 2, bias=False)])
def test_coupling_different_networks_is_refused(other):
    with pytest.raises(ValueError, match="same names and shapes"):
        couple_(nn.Linear(3, 2), other, 0.9)


def test_power_profile_starts_at_the_weights_and_weighs_by_a_power():
    """The average after n steps weighs step i like i^gamma, for large n."""
    assert ema_decay(1, gamma=6.94) == 0
    n, gamma = 4000, 3.0
    decay = torch.tensor([ema_decay(s, gamma=gamma) for s in range(1, n + 1)], dtype=torch.float64)
    kept_since = torch.cat([decay.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    weight = (1 - decay) * kept_since
    ratio = weight[n // 2] / weight[n // 4]
    assert ratio.item() == pytest.approx(2**gamma, rel=0.01)


def test_half_life_halves_after_so_many_images():
    decay = ema_decay(10_000, halflife_images=6400, batch_size=64, rampup=None)
    assert decay**100 == pytest.approx(0.5)
    ramped = ema_decay(100, halflife_images=6400, batch_size=64)
    assert ramped == pytest.approx(0.5 ** (64 / (0.05 * 6400)))
    assert ema_decay(10_000, halflife_images=6400, batch_size=64) == pytest.approx(decay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0, "gamma": 1.0}, "from 1"),
        ({"step": 1}, "either"),
        ({"step": 1, "gamma": 1.0, "halflife_images": 2.0}, "either"),
        ({"step": 1, "halflife_images": 2.0}, "batch_size"),
    ],
)
def test_impossible_averages_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ema_decay(**options)
