"""A small image generator and its data, for tests of methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser, EDMPreconditioner
from diffusion.generator import Generator
from diffusion.methods.base import GeneratorMethod
from diffusion.process import EDMProcess, Process
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Batch, Draw, Optim, Result, Run, Stage, train
from visiondistill.engine.rng import key

SHAPE = (1, 4, 4)
CLASSES = 3
ROWS = 8


class SmallUNet(nn.Module):
    """Down, middle, up: convolutions on `[B, C, H, W]`, or on every frame of `[B, F, C, H, W]`."""

    def __init__(self, channels: int = 1, width: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(channels, width, 3, 2, 1)
        self.mid_block = nn.Conv2d(width, width, 3, 1, 1)
        self.decoder = nn.ConvTranspose2d(width, channels, 2, 2)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(classes + 1, width)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`x [B, C, H, W]` with t `[B]`, or `x [B, F, C, H, W]` with t `[B]` or `[B, F]`."""
        if x.ndim == 5:
            frames = x.shape[1]
            each = t if t.ndim == 2 else t[:, None].expand(-1, frames)
            label = None if condition is None else condition.repeat_interleave(frames, output_size=len(x) * frames)
            return self(x.flatten(0, 1), each.flatten(), label).unflatten(0, (-1, frames))
        dtype, x, t = x.dtype, x.to(self.time.weight.dtype), t.to(self.time.weight.dtype)[:, None]
        told = self.time(t / (1 + t.abs()))
        if condition is not None:
            told = told + self.label(condition)
        hidden = torch.tanh(self.encoder(x) + told[:, :, None, None])
        return self.decoder(torch.tanh(self.mid_block(hidden))).to(dtype)


def small_denoiser(process: Process | None = None, kind: str = "x0", seed: int = 0, channels: int = 1) -> Denoiser:
    torch.manual_seed(seed)
    network = SmallUNet(channels).double()
    if process is None or isinstance(process, EDMProcess):
        return Denoiser(EDMPreconditioner(network), process or EDMProcess(), "x0")
    return Denoiser(network, process, kind)


def small_generator(
    process: Process | None = None,
    kind: str = "x0",
    shape: tuple[int, ...] = SHAPE,
    conditional: bool = True,
    seed: int = 0,
    **options: object,
) -> Generator:
    """Double precision, three classes."""
    conditions = ClassLabels(CLASSES) if conditional else None
    return Generator(small_denoiser(process, kind, seed, shape[-3]), shape, conditions=conditions, **options)


def small_images(rows: int = 40, size: int = 4) -> TensorData:
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(rows, 1, size, size, generator=generator, dtype=torch.float64)
    return TensorData({"image": image, "label": torch.arange(rows) % CLASSES})


def small_streams(batch_size: int = ROWS) -> dict[str, Stream]:
    data = small_images(max(40, batch_size))
    return {"train": Stream(data, batch_size), "val": Stream(data, batch_size)}


def small_draw(step: int = 0, rows: int = ROWS) -> Draw:
    parts = {"": (0, rows), "train": (0, rows), "pairs": (0, rows)}
    return Draw(0, step, parts, rows, torch.device("cpu"), torch.float64)


def prepared(
    method: GeneratorMethod, due: tuple[str, ...] = ("student", "critic"), step: int = 0, rows: int = ROWS
) -> Batch:
    """The batch of a step, as the engine would give it to the turns."""
    batch = {name: next(stream.open(step, [(0, rows)], key(0, name)))[0] for name, stream in method.streams.items()}
    with torch.no_grad():
        return method.prepare(batch, small_draw(step, rows), frozenset(due))


def play(method: GeneratorMethod, folder: Path, steps: int = 7, **settings: Any) -> Result:
    run = {"batch_size": ROWS, "log_every": 1, "progress": False, "device": "cpu", "proof_window": 2} | settings
    return train([Stage(method, steps, {"default": Optim("adam", lr=1e-2)})], Run(str(folder), **run))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def moved_apart(method: GeneratorMethod) -> GeneratorMethod:
    """A method none of whose players is the teacher any more."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.players.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return method


def by_formula(module: nn.Module) -> nn.Module:
    """Weights that hang on no generator, for golden numbers."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) + number).view_as(p) / 3)
    return module


def reached(term: Tensor, module: nn.Module) -> set[str]:
    """Names of the module's parts (first level below denoiser and preconditioner) to which a term sends a gradient."""
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
    moved = [name for name, g in zip(named, gradients, strict=True) if g is not None and g.abs().max() > 0]
    return {name.replace("network.", "").partition(".")[0] for name in moved}


def each_turn_is_one_graph(make: Callable[[], GeneratorMethod], folder: Path) -> None:
    """From the first to the last step, and what it learns is what the same run learns without compiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = make(), make()
    play(eager, folder / "eager", proof_window=0)
    play(compiled, folder / "one", proof_window=0, compile=True, compile_backend="eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(compiled.turns())
    torch.testing.assert_close(weights(compiled.players), weights(eager.players), rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()
