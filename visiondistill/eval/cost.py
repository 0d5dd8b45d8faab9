"""What a network costs at inference: parameters, operations, latency, throughput."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visiondistill.models import Network, as_network, count_flops, count_parameters, evaluating

if TYPE_CHECKING:
    from rich.table import Table

LEAST, MOST = 5, 1000
"""Repeats of a timing, however long or short one call takes."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the quartiles as its spread.

    Attributes:
        batch: images per call.
        repeats: calls that were timed, after the warm-up.
    """

    batch: int
    median: float
    low: float
    high: float
    repeats: int

    @property
    def images_per_second(self) -> float:
        return self.batch / self.median


@dataclass(frozen=True)
class Cost:
    """What `measure_costs` found for one network.

    Attributes:
        parameters: numbers in its parameters; None for what is not a torch module.
        flops: of one image, a multiply-add counting 2; None for what is not a torch module.
        bytes: of its tensors, or of its file.
        latency: of one image at a time.
        throughput: of a batch.
        input_size: `(C, H, W)` of the images it was measured on.
        peak_bytes: device memory that the batch takes beyond weights and images; None on a CPU.
    """

    parameters: int | None
    flops: int | None
    bytes: int
    latency: Timing
    throughput: Timing
    input_size: tuple[int, int, int]
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Costs:
    """Costs by name, and where they were measured: figures of another machine are not comparable."""

    costs: dict[str, Cost]
    device: str
    threads: int
    precision: str

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: asdict(cost) | {"images_per_second": cost.throughput.images_per_second}
            for name, cost in self.costs.items()
        }
        return {"device": self.device, "threads": self.threads, "precision": self.precision, "costs": rows}

    def write(self, folder: str | Path) -> Path:
        """Write cost.json; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cost.json").write_text(json.dumps(self.to_dict(), indent=1))
        return folder


def measure_costs(
    networks: Mapping[str, nn.Module],
    batch_size: int = 64,
    seconds: float = 3.0,
    input_size: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> Costs:
    """Costs of networks beside one another, each on images of its own size, normalisation included.

    A timed call ends when the device has finished. The networks take turns, call by call, so that
    whatever else the machine does meets all of them; the first calls are not counted.

    Args:
        networks: by name, such as `{"teacher": ..., "student": ...}`. They are measured in eval
            mode, where they lie and in their own precision; modes are put back.
        batch_size: images per call for the throughput.
        seconds: time spent on each network's latency, and again on its throughput; never fewer
            than 5 calls.
        input_size: `(C, H, W)` for networks that take every size.
        device: move the networks there (and leave them there); None measures where they are.

    Raises:
        ValueError: networks on different devices, batch_size < 1, seconds <= 0, or a network that
            takes every size and no `input_size`.
    """
    if batch_size < 1 or seconds <= 0:
        raise ValueError(f"need batch_size >= 1 and seconds > 0, got {batch_size} and {seconds}")
    nets = {name: as_network(model) for name, model in networks.items()}
    if device is not None:
        nets = {name: network.to(device) for name, network in nets.items()}
    places = {network.scale.device for network in nets.values()}
    if len(places) != 1:
        raise ValueError(f"networks must lie on one device to be compared, they are on {sorted(map(str, places))}")
    where = places.pop()
    with evaluating(*nets.values()), torch.inference_mode():
        one = {name: _call(network, _images(network, 1, input_size)) for name, network in nets.items()}
        many = {name: _call(network, _images(network, batch_size, input_size)) for name, network in nets.items()}
        latency, throughput = timings(one, 1, seconds, where), timings(many, batch_size, seconds, where)
        peaks = {name: _peak(call, where) for name, call in many.items()}
    costs = {
        name: Cost(
            # An ONNX file holds both where torch cannot count them.
            parameters=count_parameters(network) or None,
            flops=count_flops(network, _size(network, input_size)) or None,
            bytes=getattr(network.model, "bytes", None) or sum(t.nbytes for t in network.state_dict().values()),
            latency=latency[name],
            throughput=throughput[name],
            input_size=_size(network, input_size),
            peak_bytes=peaks[name],
        )
        for name, network in nets.items()
    }
    precisions = sorted({str(network.scale.dtype).removeprefix("torch.") for network in nets.values()})
    return Costs(costs, device_name(where), torch.get_num_threads(), "/".join(precisions))


def timings(
    calls: Mapping[str, Callable[[], Any]], batch: int, seconds: float, device: torch.device
) -> dict[str, Timing]:
    """Time calls in turn; each is called for about `seconds` in all, at least 5 times.

    Warm-up: three calls of each, of which the last gives the number of repeats.
    """
    estimates = {name: [_timed(call, device) for _ in range(3)][-1] for name, call in calls.items()}
    repeats = {name: min(MOST, max(LEAST, round(seconds / took))) for name, took in estimates.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(max(repeats.values(), default=0)):
        for name, call in calls.items():
            if number < repeats[name]:
                found[name].append(_timed(call, device))
    return {name: _timing(times, batch) for name, times in found.items()}


def cost_table(costs: Costs) -> Table:
    """The costs, for a terminal; ratios are to the first network."""
    from rich.table import Table

    table = Table(title=f"{costs.device}, {costs.threads} threads, {costs.precision}", title_justify="left")
    for name in ("", "parameters", "MB", "GFLOPs", "latency ms", "images/s", "speed-up"):
        table.add_column(name, justify="right" if name else "left")
    first = next(iter(costs.costs.values()))
    for name, cost in costs.costs.items():
        latency, rate = cost.latency, cost.throughput.images_per_second
        table.add_row(
            name,
            "-" if cost.parameters is None else f"{cost.parameters:,}",
            f"{cost.bytes / 1e6:.2f}",
            "-" if cost.flops is None else f"{cost.flops / 1e9:.3g}",
            f"{latency.median * 1e3:.2f} ({latency.low * 1e3:.2f} to {latency.high * 1e3:.2f})",
            f"{rate:,.0f}",
            f"x{rate / first.throughput.images_per_second:.2f}",
        )
    table.caption = (
        f"latency: 1 image, median and quartiles; images/s: batches of {first.throughput.batch}; "
        f"speed-up: images/s relative to the first row"
    )
    table.caption_justify = "left"
    return table


def device_name(device: torch.device) -> str:
    """The device in words: "cpu: AMD EPYC 7B13", "cuda: NVIDIA H100"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {_processor()}"


def _processor() -> str:
    import platform

    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _call(network: Network, images: Tensor) -> Callable[[], Tensor]:
    return lambda: network(images).logits


def _size(network: Network, input_size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    size = network.input_size or input_size
    if size is None:
        raise ValueError(
            f"{type(network.model).__name__} takes images of every size: say which to measure on (input_size (C, H, W))"
        )
    return tuple(size)


def _images(network: Network, batch: int, input_size: tuple[int, int, int] | None) -> Tensor:
    size = _size(network, input_size)
    images = torch.rand(batch, *size, generator=torch.Generator().manual_seed(0))
    return images.to(network.scale.device, network.scale.dtype)


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _finish(device)
    start = perf_counter()
    call()
    _finish(device)
    return perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that the call holds beyond what was there before; CUDA alone keeps count."""
    if device.type != "cuda":
        return None
    _finish(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _finish(device)
    return torch.cuda.max_memory_allocated(device) - before


def _timing(times: list[float], batch: int) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(batch, median, low, high, len(times))
