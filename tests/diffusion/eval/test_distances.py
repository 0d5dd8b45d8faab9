"""Distances between sets: closed forms, limits, and the arithmetic of the library that publishes FID."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion.eval import (
    FeatureSet,
    Statistics,
    energy_distance,
    frechet_distance,
    kernel_distance,
    mean_distance,
    precision_recall,
    sliced_wasserstein,
)


def normal(n: int, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, d: int, seed: int) -> torch.Tensor:
    return normal(n, d, seed) @ normal(d, d, seed + 100) + normal(1, d, seed + 200)


def exact(mean: torch.Tensor, root: torch.Tensor) -> Statistics:
    """Statistics whose mean and (unbiased) covariance root @ root.T are exactly these."""
    n = 10
    covariance = root @ root.T
    return Statistics(n, n * mean, (n - 1) * covariance + n * torch.outer(mean, mean))


def test_statistics_are_those_of_numpy_and_add_up():
    x = correlated(500, 6, 0)
    whole = Statistics.of(x)
    torch.testing.assert_close(whole.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-10)
    for cut in (1, 7, 250):
        parts = [Statistics.of(part) for part in x.float().split(cut)]
        merged = sum(parts[1:], parts[0])
        assert merged.count == 500
        torch.testing.assert_close(merged.covariance, Statistics.of(x.float()).covariance, rtol=1e-12, atol=1e-12)


def test_statistics_lift_single_precision():
    """Far from the origin float32 sums would lose the variance altogether."""
    x = (1000 + normal(20_000, 2)).float()
    torch.testing.assert_close(Statistics.of(x).covariance, torch.cov(x.double().T), rtol=1e-7, atol=1e-9)


def test_frechet_distance_of_gaussians_that_commute():
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    mean = torch.tensor([1.0, -2.0, 0.0]).double()
    expected = 5 + (a - b).square().sum().item()
    assert frechet_distance(exact(mean, a.diag()), exact(0 * mean, b.diag())) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_two_correlated_planes():
    """tr (AB)^(1/2) of 2 x 2 matrices is (tr AB + 2 (det A det B)^(1/2))^(1/2)."""
    left, right = normal(2, 2, 1), normal(2, 2, 2)
    a, b = left @ left.T, right @ right.T
    cross = math.sqrt((a @ b).trace() + 2 * math.sqrt(a.det() * b.det()))
    zero = torch.zeros(2, dtype=torch.float64)
    assert frechet_distance(exact(zero, left), exact(zero, right)) == pytest.approx(
        (a.trace() + b.trace() - 2 * cross).item(), rel=1e-9
    )


@pytest.mark.parametrize("rows", [300, 12])
def test_frechet_distance_of_a_set_to_itself_is_zero(rows):
    """Also with fewer rows than features, where roots of rounded zeros would add up."""
    x = 100 * correlated(rows, 40, 3)
    scale = Statistics.of(x).covariance.trace().item()
    assert 0 <= frechet_distance(Statistics.of(x), Statistics.of(x)) < 1e-10 * scale


def test_frechet_distance_with_fewer_rows_than_features():
    """tr (C_x C_y)^(1/2) is the nuclear norm of the product of the centred sets, which needs no root."""
    x, y = correlated(12, 40, 3), correlated(15, 40, 4)
    a, b = ((each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_moves_by_the_square_of_a_shift():
    x = correlated(100, 4, 3)
    assert frechet_distance(Statistics.of(x), Statistics.of(x + 3)) == pytest.approx(4 * 9, rel=1e-9)


def test_kernel_distance_by_hand():
    x, y = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    # (x.y / 2 + 1)^3: within x 1, within y (2 + 1)^3, across 1, 1, 1, 27.
    found = kernel_distance(x, y, subsets=1)
    assert found.mean == pytest.approx(1 + 27 - 2 * 30 / 4)
    assert found.spread == 0


def test_kernel_distance_is_unbiased_and_sees_a_difference():
    values = [kernel_distance(normal(100, 3, s), normal(100, 3, 1000 + s), 1).mean for s in range(200)]
    error = torch.tensor(values).std().item() / math.sqrt(len(values))
    assert abs(sum(values) / len(values)) < 3 * error, "the mean of many equal pairs is zero"
    assert min(values) < 0
    far = kernel_distance(normal(100, 3), 1.5 * normal(100, 3, 9), subsets=10, size=50)
    assert far.mean > 5 * error
    assert far.spread > 0


def test_kernel_distance_depends_on_its_seed_alone():
    x, y = normal(60), normal(50, seed=1)
    state = torch.get_rng_state()
    assert kernel_distance(x, y, 5, 20, seed=3) == kernel_distance(x, y, 5, 20, seed=3)
    assert kernel_distance(x, y, 5, 20, seed=3) != kernel_distance(x, y, 5, 20, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_and_recall_at_their_limits():
    x = normal(200, 4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    collapsed = precision_recall(x[:1].expand(200, 4) + 1e-6, x)
    assert collapsed.precision == 1
    assert collapsed.recall == 0
    half = precision_recall(torch.cat([x[:100], x[100:] + 100]), x)
    assert half.precision == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("rows", [5, 10, 37, 500])
def test_copies_of_one_image_lie_where_it_lies(rows):
    """Of one constant image there are balls without a radius: to be equal is all that is left."""
    feature = torch.rand(1, 512, generator=torch.Generator().manual_seed(0)) * 7
    assert precision_recall(feature.repeat(rows, 1), feature.repeat(400, 1)) == (1.0, 1.0)
    assert precision_recall(feature.repeat(rows, 1), feature.repeat(400, 1) + 1e-3) == (0.0, 0.0)


def test_precision_by_hand():
    """Third neighbours: 0 reaches 3 far, 6 reaches 5 far, and no other ball leaves what these two hold."""
    real = torch.tensor([[0.0], [1.0], [3.0], [2.0], [6.0]])
    samples = torch.tensor([[-2.9], [-3.1], [10.9], [11.1], [2.5]])
    assert precision_recall(samples, real).precision == pytest.approx(3 / 5)


def test_rows_are_cut_without_a_trace(monkeypatch):
    from diffusion.eval import distances

    x, y = normal(90, 4), normal(70, 4, 1)
    whole = precision_recall(x, y), mean_distance(x)
    monkeypatch.setattr(distances, "ROWS", 13)
    assert precision_recall(x, y) == whole[0]
    assert mean_distance(x) == pytest.approx(whole[1], rel=1e-12)


def test_mean_distance_of_all_pairs_and_within_classes():
    x, label = torch.tensor([[0.0], [1.0], [10.0], [13.0], [50.0], [90.0]]), torch.tensor([0, 0, 1, 1, -1, -1])
    assert mean_distance(x) == pytest.approx(torch.pdist(x).mean().item())
    assert mean_distance(x, label) == pytest.approx((1 + 3) / 2)
    assert mean_distance(x[1:5:2], label[1:5:2]) is None


def test_sliced_wasserstein_closed_forms():
    x = normal(400, 3)
    assert sliced_wasserstein(x, x[torch.randperm(400)]) == pytest.approx(0, abs=1e-12)
    # A shift s moves every projection by s . direction: |s| / sqrt(D) in the mean square.
    shift = torch.tensor([2.0, 0.0, 0.0]).double()
    assert sliced_wasserstein(x, x + shift, projections=2000) == pytest.approx(2 / math.sqrt(3), rel=0.05)
    assert sliced_wasserstein(x, x + shift, seed=1) != sliced_wasserstein(x, x + shift, seed=2)


def test_sliced_wasserstein_of_unequal_sizes():
    """In one dimension: quantile functions, here against sets repeated to their common multiple."""
    x, y = normal(6, 1), normal(4, 1, 1)
    expected = (x.repeat(2, 1).sort(0).values - y.repeat(3, 1).sort(0).values).square().mean().sqrt().item()
    assert sliced_wasserstein(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_energy_distance_of_points_far_from_the_origin(spread):
    from scipy.spatial.distance import cdist, pdist

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 2, generator=generator).double() * spread + 10 for n in (300, 200))
    expected = 2 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean()
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-6)
    apart = torch.tensor([spread, 0.0])
    assert energy_distance(x.float(), y.float() + apart) == pytest.approx(energy_distance(x, y + apart), rel=2e-2)


def test_energy_distance_needs_no_mixture():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert energy_distance(x, x) == pytest.approx(2 * 2.5 - 5 - 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernel_distance(normal(9, 2), normal(9, 3)),
        lambda: precision_recall(normal(9, 2), normal(9, 3)),
        lambda: sliced_wasserstein(normal(9, 2), normal(9, 3)),
        lambda: frechet_distance(Statistics.of(normal(9, 2)), Statistics.of(normal(9, 3))),
        lambda: precision_recall(normal(3, 2), normal(9, 2)),
        lambda: kernel_distance(normal(1, 2), normal(9, 2)),
        lambda: energy_distance(normal(1, 2), normal(9, 2)),
        lambda: Statistics.of(normal(1, 2)).covariance,
        lambda: Statistics.of(torch.zeros(0, 2)),
    ],
)
def test_what_cannot_be_compared_is_refused(call):
    with pytest.raises(ValueError, match=r"one length|more than k|size >= 2|at least 2|N >= 1"):
        call()


def test_halves_are_disjoint_and_of_the_size_asked_for():
    held = FeatureSet(torch.arange(21.0)[:, None], torch.arange(21))
    first, second = held.halves(5)
    assert (len(first), len(second)) == (5, 5)
    assert not set(first.label.tolist()) & set(second.label.tolist())
    assert [len(half) for half in held.halves(500)] == [10, 10]
    assert torch.equal(first.features[:, 0].long(), first.label)
    assert not torch.equal(held.halves(5, seed=1)[0].label, first.label)


def test_the_arithmetic_is_torch_fidelitys():
    """FID, KID and precision/recall as the library computes them, on the same features."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = correlated(400, 24, 0), 1.3 * correlated(500, 24, 0)[:300] + 0.3 * correlated(300, 24, 1)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    ours = frechet_distance(Statistics.of(x), Statistics.of(y))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    kid = kid_features_to_metric(x[:300], y, kid_subsets=2, kid_subset_size=300, verbose=False)
    ours = kernel_distance(x[:300], y, subsets=2, size=300)
    assert ours.mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.spread == pytest.approx(kid["kernel_inception_distance_std"], abs=1e-9 * abs(ours.mean))
    x, y = x[:, :3], 3 * y[:, :3]
    coverage = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False)
    assert precision_recall(x, y) == pytest.approx((coverage["precision"], coverage["recall"]), abs=1e-6)
    assert 0.1 < coverage["recall"] < 0.9
