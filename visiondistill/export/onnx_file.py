"""ONNX files, float32 and int8 for CPUs; they need the packages of the extra "export"."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.engine.state import sha256_of
from visiondistill.export.program import Pixels, sample_images
from visiondistill.models import Network

FILE = "model.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference of logits, over the largest logit or 1."""


def require_onnx() -> None:
    """Raise ModuleNotFoundError with the cure, before anything is written, where a package is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'visiondistill[export]'")


def write(network: Network, path: Path, samples: Sequence[Tensor]) -> float:
    """Write an ONNX file that takes images in [0, 1], any number at a time, and compare its logits.

    Returns:
        the largest difference.

    Raises:
        ModuleNotFoundError: a package is missing.
        RuntimeError: logits differ by more than 1e-4.
    """
    require_onnx()
    torch.onnx.export(
        Pixels(network).eval(),
        (samples[-1],),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    opened, worst = OnnxClassifier(path), 0.0
    for images in samples:
        expected = network(images).logits
        apart = (opened(images) - expected).abs().max().item()
        if not apart <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"{path.name}'s logits differ from the model's by {apart:.3g}")
        worst = max(worst, apart)
    return worst


def write_int8(source: Path, path: Path, images: Iterable[Tensor]) -> None:
    """Quantise an ONNX file: activations to 8 bits, weights to 7, so that sums are right on every CPU.

    Args:
        source: float32, as of `write`.
        path: of the new file.
        images: batches in [0, 1], of the *training* data, from which the ranges of the
            activations are read; a few hundred images do.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    require_onnx()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            _Ranges(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Seven bits of weights: with eight, sums of products saturate on CPUs without VNNI, silently
            # (the mean error of logits was 17 times as large there).
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
    finally:
        prepared.unlink(missing_ok=True)


def onnx_variants(network: Network, folder: str | Path, images: Iterable[Tensor]) -> dict[str, Network]:
    """The network as ONNX in float32 and in int8, to be measured beside it (`evaluate`, `measure_costs`).

    Args:
        network: with an input size of its own.
        folder: where model.onnx and model_int8.onnx are written.
        images: as of `write_int8`, of any size.

    Raises:
        ValueError: the network takes images of every size; further errors as `write`.
    """
    require_onnx()
    if network.input_size is None:
        raise ValueError(f"{type(network.model).__name__} takes images of every size, an ONNX file one: set input_size")
    portable = copy.deepcopy(network).cpu().float().eval()
    plain, small = Path(folder) / FILE, Path(folder) / "model_int8.onnx"
    plain.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        write(portable, plain, sample_images(network.input_size))
        write_int8(plain, small, (_resized(portable, batch) for batch in images))
    return {
        name: Network(OnnxClassifier(path), input_size=network.input_size, interpolation=network.interpolation)
        for name, path in (("onnx float32", plain), ("onnx int8", small))
    }


def _resized(network: Network, images: Tensor) -> Tensor:
    """Images as the file takes them: of the network's size, not normalised."""
    return Network(nn.Identity(), input_size=network.input_size, interpolation=network.interpolation)(images).logits


class OnnxClassifier(nn.Module):
    """An ONNX file as a classifier of pixels in [0, 1], so that it can be measured like any other.

    Args:
        path: of the file.
        threads: that it computes with; by default as many as torch.

    Attributes:
        bytes: of the file.
        weights_hash: the file's sha256.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.weights_hash, self.bytes = sha256_of(path), Path(path).stat().st_size

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"images": images.cpu().float().numpy()})
        return torch.from_numpy(logits)


class _Ranges:
    """What onnxruntime reads batches from."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.batches = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.cpu().float().numpy()}
