"""On a CUDA device: the same answers, costs that wait for the device, exports that come from it."""

from __future__ import annotations

import pytest
import torch
from test_fresh_process import NAMES, small_timm, trained

from visiondistill.data import Digits
from visiondistill.eval import accuracy_report, evaluate, measure_costs, weights_hash
from visiondistill.export import export, open_export
from visiondistill.models import Network, SmallConvNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_network_on_the_device_is_measured_and_exported_as_on_the_host(tmp_path):
    network, data = trained(small_timm), Digits("test")
    here, digest = evaluate(network, data), weights_hash(network)
    network.cuda()
    there = accuracy_report(network, data, val=Digits("val"))
    assert there.weights["sha256"] == digest
    assert abs(there.scores.correct - here.correct) <= 1
    assert there.scores.nll == pytest.approx(here.nll, abs=2e-3)  # TF32 convolutions
    exported = export(network, tmp_path / "export", classes=NAMES)
    assert exported.format == "timm"
    assert exported.weights_sha256 == digest
    opened, _ = open_export(exported.folder)
    assert evaluate(opened, data).correct == here.correct


def test_timings_wait_for_the_device_and_memory_is_counted():
    def net(wide: int) -> Network:
        return Network(SmallConvNet((wide, wide, wide), in_channels=3), input_size=(3, 64, 64)).cuda()

    found = measure_costs({"small": net(32), "large": net(512)}, batch_size=256, seconds=0.5)
    small, large = found.costs.values()
    assert found.device.startswith("cuda: ")
    # A clock that stops when the kernels are queued would see next to no difference.
    assert large.throughput.median > 8 * small.throughput.median
    assert large.peak_bytes > 256 * 512 * 64 * 64 * 4 > small.peak_bytes


def test_an_opened_program_answers_on_the_device(tmp_path):
    network = Network(SmallConvNet(norm="batch"), [0.3], [0.4], (1, 16, 16), "bicubic")
    opened, _ = open_export(export(network, tmp_path / "export", classes=NAMES).folder)
    images = torch.rand(3, 1, 16, 16)
    expected = opened(images).logits
    torch.testing.assert_close(opened.cuda()(images.cuda()).logits.cpu(), expected, rtol=1e-2, atol=1e-2)  # TF32
