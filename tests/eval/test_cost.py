"""Costs: counts by hand, timings that exclude the warm-up and take turns."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from visiondistill.eval import cost_table, measure_costs
from visiondistill.eval.cost import timings
from visiondistill.models import Network, SmallConvNet

CPU = torch.device("cpu")


def linear(size: int = 8, wide: int = 10) -> Network:
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(size * size, wide)), [0.5], [0.5], (1, size, size))


def test_parameters_and_operations_are_counted_by_hand():
    found = measure_costs({"small": linear(), "large": linear(16, 20)}, batch_size=4, seconds=0.01)
    small, large = found.costs["small"], found.costs["large"]
    assert (small.parameters, small.flops, small.bytes) == (650, 2 * 64 * 10, 4 * 650)
    assert (large.parameters, large.flops) == (256 * 20 + 20, 2 * 256 * 20)
    assert small.input_size == (1, 8, 8)
    assert small.peak_bytes is None
    assert found.precision == "float32"
    assert found.threads == torch.get_num_threads()
    assert found.device.startswith("cpu: ")


def test_the_warm_up_is_excluded_and_the_median_is_not_the_slowest():
    calls = []

    def slow_at_first() -> None:
        calls.append(None)
        time.sleep(0.05 if len(calls) <= 2 or len(calls) == 6 else 0.005)

    found = timings({"net": slow_at_first}, batch=3, seconds=0.04, device=CPU)["net"]
    assert len(calls) == found.repeats + 3
    assert 5 <= found.repeats <= 12
    assert 0.005 <= found.low <= found.median <= found.high
    assert found.median < 0.03
    assert found.images_per_second == pytest.approx(3 / found.median)


def test_networks_take_turns():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "ab"}
    timings(calls, batch=1, seconds=0.02, device=CPU)
    measured = "".join(order[6:])
    assert measured.startswith("ababababab")


def test_a_network_of_more_work_is_slower():
    nets = {"small": SmallConvNet((4, 4)), "large": SmallConvNet((64, 128))}
    found = measure_costs(nets, batch_size=16, seconds=0.1, input_size=(1, 32, 32))
    small, large = found.costs.values()
    assert small.flops < large.flops
    assert small.throughput.images_per_second > 2 * large.throughput.images_per_second


def test_modes_and_generators_stay_as_they_were():
    net = SmallConvNet(norm="batch").train()
    before, state = net.state_dict()["stages.0.1.running_mean"].clone(), torch.get_rng_state()
    measure_costs({"net": net}, batch_size=2, seconds=0.01, input_size=(1, 8, 8))
    assert net.training
    assert torch.equal(before, net.state_dict()["stages.0.1.running_mean"])
    assert torch.equal(state, torch.get_rng_state())


def test_costs_are_written_and_shown(tmp_path):
    from rich.console import Console

    found = measure_costs({"teacher": linear(16), "student": linear()}, batch_size=4, seconds=0.01)
    written = json.loads((found.write(tmp_path / "cost") / "cost.json").read_text())
    assert written["costs"]["student"]["parameters"] == 650
    assert written["costs"]["teacher"]["latency"]["repeats"] >= 5
    assert written["device"] == found.device
    console = Console(width=140, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(cost_table(found))
    assert "650" in console.export_text()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"SmallConvNet takes images of every size.*input_size"):
        measure_costs({"net": SmallConvNet()})
    with pytest.raises(ValueError, match="batch_size >= 1"):
        measure_costs({"net": linear()}, batch_size=0)
    with pytest.raises(ValueError, match="one device"):
        measure_costs({"here": linear(), "there": linear().to("meta")})
