from __future__ import annotations

import torch

from visiondistill.data import EpochOrder


def test_every_sample_comes_once_per_epoch_however_places_are_cut():
    order = EpochOrder(7, seed=1)
    whole = torch.cat([order.between(first, first + 5) for first in range(0, 35, 5)])
    for epoch in whole.view(5, 7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert torch.equal(whole, EpochOrder(7, seed=1).between(0, 35))


def test_places_do_not_depend_on_what_was_read_before():
    forward, jumping = EpochOrder(10, seed=3), EpochOrder(10, seed=3)
    read = {first: forward.between(first, first + 4) for first in range(0, 80, 4)}
    for first in (76, 0, 40, 8, 44):
        assert torch.equal(jumping.between(first, first + 4), read[first])


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [EpochOrder(50, seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_default_generator_is_left_alone():
    before = torch.default_generator.get_state()
    EpochOrder(50, 0).between(0, 200)
    assert torch.equal(torch.default_generator.get_state(), before)
