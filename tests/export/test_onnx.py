"""ONNX, where its packages are installed: logits within 1e-4, int8 close in its answers, both measurable."""

from __future__ import annotations

import pytest
import torch
from test_fresh_process import small, trained

from visiondistill.data import Digits
from visiondistill.eval import agreement, evaluate, measure_costs
from visiondistill.export import export, onnx_file, onnx_variants
from visiondistill.models import Network, SmallConvNet

NAMES = [str(number) for number in range(10)]


def test_without_its_packages_onnx_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "NEEDED", ("onnx", "no_such_package"))
    cure = r"ONNX needs .*no_such_package: pip install 'visiondistill\[export\]'"
    with pytest.raises(ModuleNotFoundError, match=cure):
        export(Network(SmallConvNet(), input_size=(1, 8, 8)), tmp_path / "export", classes=NAMES, onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_onnx_answers_as_the_network_does(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    network = trained(small)
    exported = export(network, tmp_path / "export", classes=NAMES, onnx=True)
    assert 0 <= exported.largest_difference["onnx"] < 1e-4
    session = runtime.InferenceSession(str(exported.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows in (1, 5):
        images = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            expected = network(images).logits
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_eight_bits_are_measured_like_any_network(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    network, data = trained(small), Digits("val")
    ranges = [Digits("train").rows(torch.arange(0, 200))["image"]]
    variants = onnx_variants(network, tmp_path / "onnx", ranges)
    plain, int8 = variants["onnx float32"], variants["onnx int8"]
    assert evaluate(plain, data).correct == evaluate(network, data).correct
    assert 0.9 < agreement(int8, network, data) <= 1
    images = data.columns["image"]
    logits = plain(images).logits
    # Saturating sums, as of 8-bit weights on CPUs without VNNI, are off by a fifth of the spread.
    assert 1e-4 < (int8(images).logits - logits).abs().mean() / logits.std() < 0.05
    costs = measure_costs({"student": network, **variants}, batch_size=8, seconds=0.02).costs
    assert costs["onnx int8"].parameters is None
    assert costs["onnx int8"].bytes == (tmp_path / "onnx" / "model_int8.onnx").stat().st_size
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model_int8.onnx"]
