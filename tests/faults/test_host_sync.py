"""A steady step never waits for the device: not in the loop, not in a turn, not in the data stream.

On a GPU CUDA itself says so (`set_sync_debug_mode`). Elsewhere `NoSync` stands in: it refuses what would wait
for a GPU if the tensors lay on one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniatures import EXTRA, MINIATURES, TinyNet, built, images
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from visiondistill import Distiller, recipes
from visiondistill.augmentors import Augment, Chain, Mix
from visiondistill.data import OwnData, Stream, TensorData
from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Run, Stage, Terms, Turn, train
from visiondistill.engine.launch import World
from visiondistill.engine.shares import Shares
from visiondistill.models import Network, SmallConvNet
from visiondistill.teachers import Ensemble, as_teacher
from visiondistill.terms import CE, DIST, DKD, KL, Hint
from visiondistill.weighting import Fixed
from visiondistill.weighting.fixed import Ramp


class HostSync(Exception):
    """Something that would make the host wait for a GPU."""


HOST = {"item", "tolist", "numpy", "cpu", "__array__", "__repr__", "__format__"}
HOST |= {"__bool__", "__int__", "__float__", "__complex__", "__index__"}
"""Tensor methods that end on the host; some leave no trace among the operations of a CPU tensor."""
FROM_HOST = {"tensor", "as_tensor", "new_tensor"}
"""What makes a tensor of a host value. Where it goes to a device, the copy has to wait for that."""
HOST_ON_CPU_ALONE = {F.one_hot}
"""These check the range of their input on the CPU and nowhere else."""
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
"""Operations whose result, or its shape, is read by the host."""


class _Calls(TorchFunctionMode):
    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations, self.host = operations, []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in HOST or (name == "to" and "cpu" in (*args[1:2], kwargs.get("device"))):
            raise HostSync(name)
        if name == "new_tensor" or (name in FROM_HOST and "device" in kwargs):
            raise HostSync(f"{name} copies a value to the device")
        if name == "to" and any(args[0] is each for each in self.host) and _moves(args, kwargs):
            raise HostSync("to copies a value to the device")
        self.operations.excused += func in HOST_ON_CPU_ALONE
        try:
            result = func(*args, **kwargs)
        finally:
            self.operations.excused -= func in HOST_ON_CPU_ALONE
        if name in FROM_HOST:
            self.host.append(result)
        return result


def _moves(args: tuple, kwargs: dict[str, Any]) -> bool:
    return "device" in kwargs or not isinstance(next(iter(args[1:]), torch.float), torch.dtype)


class _Operations(TorchDispatchMode):
    excused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.removeprefix("_").startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if (name in WAITS or masks) and not self.excused:
            raise HostSync(f"{name} with a mask" if masks else name)
        return func(*args, **kwargs or {})


class NoSync(contextlib.ExitStack):
    """Raises `HostSync` at whatever would make the host wait for a GPU."""

    def __enter__(self) -> NoSync:
        operations = self.enter_context(_Operations())
        self.enter_context(_Calls(operations))
        return self


@contextlib.contextmanager
def cuda_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


PROOF, FIRST, LAST, STEPS = 2, 6, 11, 12
"""Steps `FIRST` to `LAST` (exclusive) are watched: after the proof of each turn, before the end, with nothing due.

The rarest turn of all comes every fifth step: at 0 and 5 it is proved, at 10 watched.
"""


@contextlib.contextmanager
def steady(guard: Callable[[], contextlib.AbstractContextManager]) -> Iterator[list[int]]:
    """Put the steps of a run between `FIRST` and `LAST` under `guard`, reading of data and loop included."""
    plain, watched = Shares.feed, []
    open_guards = contextlib.ExitStack()

    def feed(self: Shares, start: int) -> Iterator[list[Batch]]:
        for step, batches in enumerate(plain(self, start), start):
            if step == LAST:
                open_guards.close()
            if FIRST <= step < LAST:
                watched.append(step)
            yield batches
            # The loop asks for step FIRST: from reading it on, it is guarded.
            if step + 1 == FIRST:
                open_guards.enter_context(guard())

    with pytest.MonkeyPatch.context() as patch, open_guards:
        patch.setattr(Shares, "feed", feed)
        yield watched


def watch(stages: list[Stage], settings: dict[str, Any], folder: Path, device: str = "cpu") -> None:
    settings = settings | {"log_every": 100, "proof_window": PROOF, "progress": False, "device": device}
    with steady(NoSync if device == "cpu" else cuda_error) as watched:
        train(stages, Run(str(folder), **settings))
    assert watched[: LAST - FIRST] == list(range(FIRST, LAST))
    assert len(watched) == (LAST - FIRST) * len(stages)


def each_long(stages: list[Stage]) -> list[Stage]:
    return [Stage(stage.method, STEPS, stage.optim, stage.name) for stage in stages]


def miniature(name: str) -> tuple[list[Stage], dict[str, Any]]:
    stages, settings = (MINIATURES | EXTRA)[name](0, STEPS)
    return each_long(stages), settings


# ------------------------------------------------------------------------------------------- THE STAND-IN SEES THEM ALL

MASK, SCALAR = torch.tensor([True, False, True]), torch.tensor(2.0)

SYNCS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "index": lambda x: [1, 2, 3][x[0].long()],
    "format": lambda x: f"{x[0]}",
    "print": lambda x: str(x),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[MASK],
    "mask write": lambda x: x.index_put_((MASK,), SCALAR),
    "mask assignment": lambda x: x.__setitem__(MASK, 0.0),
    "masked_select": lambda x: x.masked_select(MASK),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: x.allclose(x),
    "in": lambda x: 1.0 in x,
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "new value": lambda x: x * x.new_tensor(0.5),
    "value on the device": lambda x: x * torch.tensor(0.5, device=x.device),
    "tensor to the device": lambda x: x * torch.tensor([0.1, 0.2, 0.3]).to(x.device),
    "tensor to another": lambda x: x * torch.as_tensor([0.1, 0.2, 0.3]).to(x),
}


@pytest.mark.parametrize("name", SYNCS)
def test_the_stand_in_refuses(name: str) -> None:
    x = torch.ones(3)
    SYNCS[name](x.clone())
    with pytest.raises(HostSync), NoSync():
        SYNCS[name](x)


def test_the_stand_in_lets_pass_what_a_gpu_does_without_the_host() -> None:
    x, rows = torch.ones(3, requires_grad=True), torch.tensor([2, 0])
    with NoSync():
        y = torch.where(x > 0, x, 0.0).masked_fill(MASK, 1.0)[rows] + torch.full((), 0.5)
        y = y * F.one_hot(rows, 3)[:, 0] * torch.tensor(0.5).double()
        y.sum().backward()
        x.detach().index_put_((rows,), torch.zeros(2))
    assert x.grad is not None


class Planted(Method):
    """Cross-entropy, with a host sync at one step where the test wants it."""

    def __init__(self, place: str, step: int = FIRST + 2) -> None:
        super().__init__({"student": built(0, TinyNet)}, streams={"train": images()})
        self.place, self.due = place, step
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def plant(self, place: str, step: int, x: Tensor) -> None:
        if (place, step) == (self.place, self.due):
            x.detach().sum().item()

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        self.step = draw.step
        self.plant("prepare", draw.step, batch["train"]["image"])
        return batch

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        loss = F.cross_entropy(self.players["student"](batch["train"]["image"]), batch["train"]["label"])
        self.plant("loss", self.step, loss)
        if self.place == "backward" and loss.requires_grad:
            loss.register_hook(lambda gradient: self.plant("backward", self.step, gradient))
        return {"ce": loss}, {"loss": loss}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        self.plant("after", self.step, carry["loss"])
        return {"seen": self.seen + 1}


@pytest.mark.parametrize("place", ["prepare", "loss", "backward", "after"])
def test_a_planted_sync_is_found(place: str, tmp_path: Path) -> None:
    with pytest.raises(HostSync, match=r"item|_local_scalar_dense"):
        watch([Stage(Planted(place), STEPS)], {"batch_size": 8}, tmp_path)


def test_it_is_the_steady_steps_that_are_watched(tmp_path: Path) -> None:
    for number, step in enumerate((FIRST - 1, LAST)):
        watch([Stage(Planted("prepare", step), STEPS)], {"batch_size": 8}, tmp_path / str(number))


def test_an_optimiser_without_a_gate_waits_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The one deliberate sync of the engine: see `TurnRunner._move`."""
    stage = Stage(Planted("nowhere"), STEPS, {"student": Optim("lamb")})
    with pytest.raises(HostSync, match="item"):
        watch([stage], {"batch_size": 8}, tmp_path / "watched")
    train([Stage(Planted("nowhere"), 3, stage.optim)], Run(str(tmp_path / "told"), batch_size=8, device="cpu"))
    assert "one host sync per turn" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- NOTHING WAITS FOR IT


def settings_of(name: str) -> dict[str, Any]:
    """Every setting of a run that adds work to a step, on one miniature each."""
    return {
        "mutual": {"grad_accum_steps": 2},
        "probe": {"grad_accum_steps": 2},
        "hint": {"ema_warmup": True},
        "bank": {"mixed_precision": "bf16"},
        "stages": {"channels_last": True},
    }.get(name, {})


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures(name: str, tmp_path: Path) -> None:
    stages, settings = miniature(name)
    watch(stages, settings | settings_of(name), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_on_a_gpu(name: str, tmp_path: Path) -> None:
    stages, settings = miniature(name)
    watch(stages, settings | settings_of(name), tmp_path, "cuda")


def pictures(channels: int = 3, rows: int = 48, labelled: bool = True) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (rows, channels, 16, 16), generator=generator, dtype=torch.uint8)
    label = torch.arange(rows) % 4
    return TensorData({"image": image, "label": label if labelled else label.masked_fill(label == 3, -1)})


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Network(SmallConvNet([4, 8], "batch", in_channels=3, num_classes=4), input_size=(3, 16, 16))


@pytest.fixture(scope="module")
def source() -> OwnData:
    return OwnData(pictures(), val_fraction=0, test_fraction=0)


RECIPES = ["kd", "dkd", "dist", "lskd", "finetune"]


def recipe(name: str, source: OwnData, folder: Path) -> tuple[list[Stage], dict[str, Any]]:
    given = {"data": source, "student": net(1)} | ({} if name == "finetune" else {"teacher": net(2)})
    config = {key: node for key, node in recipes.load(name).items() if key not in given}
    config = recipes.override(config, {"steps": STEPS, "run": {"output_dir": str(folder), "batch_size": 8}})
    return recipes.plan(config, given).stages, {"batch_size": 8}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, source: OwnData, tmp_path: Path) -> None:
    watch(*recipe(name, source, tmp_path), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_on_a_gpu(name: str, source: OwnData, tmp_path: Path) -> None:
    watch(*recipe(name, source, tmp_path), tmp_path, "cuda")


EVERYTHING = {"shift": 2, "zoom": 0.5, "turn": 20, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}


def distiller(name: str) -> tuple[list[Stage], dict[str, Any]]:
    """Every term, weighting, teacher and augmentor that no recipe above has."""
    ensemble = as_teacher(Ensemble({"one": net(2), "two": net(3)}))
    arguments: dict[str, Any] = {
        "every term": {
            "terms": {"ce": CE(0.1), "kl": KL(), "dkd": DKD(), "dist": DIST(), "hint": Hint(0, 1)},
            "weighting": Fixed({"dkd": Ramp(0.5, 1.0, 50)}),
            "augmentor": Augment(erase=0.3, **EVERYTHING),
        },
        "unlabelled": {"terms": {"ce": CE(), "kl": KL()}, "teacher": ensemble, "augmentor": Augment()},
        "mixed": {"terms": {"ce": CE(), "kl": KL()}, "augmentor": Chain([Augment(), Mix(4, 0.8, 1.0)])},
    }[name]
    stream = Stream(pictures(labelled=name != "unlabelled"), 8)
    method = Distiller(**{"teacher": net(2), "student": net(1), "streams": {"train": stream}} | arguments)
    return [Stage(method, STEPS, {"default": Optim("momentum", clip=1.0, schedule="cosine", warmup=3)})], {
        "batch_size": 8,
        "ema_decay": 0.9,
    }


DISTILLERS = ["every term", "unlabelled", "mixed"]


@pytest.mark.parametrize("name", DISTILLERS)
def test_distillers(name: str, tmp_path: Path) -> None:
    watch(*distiller(name), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DISTILLERS)
def test_distillers_on_a_gpu(name: str, tmp_path: Path) -> None:
    watch(*distiller(name), tmp_path, "cuda")


def ring() -> tuple[list[Stage], dict[str, Any]]:
    """The recipe of the ring, both stages."""
    changes = {"stages.regression.steps": STEPS, "stages.dmd2.steps": STEPS}
    stages, _ = recipes.build(recipes.override(recipes.load("smoke/dmd2"), changes))
    return stages, {"batch_size": 16, "ema_decay": 0.9, "ema_warmup": True}


def test_the_ring(tmp_path: Path) -> None:
    watch(*ring(), tmp_path)


@pytest.mark.gpu
def test_the_ring_on_a_gpu(tmp_path: Path) -> None:
    watch(*ring(), tmp_path, "cuda")


def test_a_student_of_several_steps(tmp_path: Path) -> None:
    stages, settings = ring()
    watch([stages[0], Stage(several_steps, STEPS, name="dmd2")], settings, tmp_path)


def several_steps(initial: nn.Module) -> Method:
    from diffusion.generator import Generator
    from diffusion.methods.dmd2 import DMD2
    from diffusion.toys import exact_denoiser
    from diffusion.toys import ring as gaussians

    teacher = Generator(exact_denoiser(gaussians(), initial.process), (2,))
    return DMD2(teacher, student=initial, fake_score=copy.deepcopy(initial), student_steps=3)


PROCESSES = ["edm", "flow", "vp"]


def matching(name: str, folder: Path) -> tuple[list[Stage], dict[str, Any]]:
    """A teacher trained on points, then DMD2 with all its terms and two steps, on one noise path."""
    from diffusion.codecs import Pixels
    from diffusion.conditions import ClassLabels
    from diffusion.critics import GAN
    from diffusion.denoiser import Denoiser
    from diffusion.generator import Generator
    from diffusion.methods import DMD2, Denoising, Regression
    from diffusion.pairs import store_pairs
    from diffusion.process import EDMProcess, FlowProcess, VPProcess
    from diffusion.toys import MLP

    class Labelled(MLP):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return super().forward(x + condition[:, None], t)

    process = {"edm": EDMProcess(), "flow": FlowProcess(3.0, num_steps=100), "vp": VPProcess.from_betas()}[name]
    denoiser = Denoiser(Labelled(width=16), process, {"edm": "x0", "flow": "velocity", "vp": "eps"}[name])
    generator = Generator(denoiser, (2,), codec=Pixels(), conditions=ClassLabels(3), steps=2, guidance_scale=2.0)
    pairs = str(store_pairs(generator, 32, folder / "pairs"))
    points = TensorData({"code": torch.randn(64, 2), "label": torch.arange(64) % 3})
    streams = {"train": Stream(points, 16)}
    gan, regression = GAN(taps=["layers.1"], kind="relativistic", r1=1.0), Regression(pairs, 16)
    options = {"gan": gan, "regression": regression, "student_every": 2, "student_steps": 2, "sigma_data": None}
    stages = [
        Stage(Denoising(copy.deepcopy(generator), streams), STEPS, name="teacher"),
        Stage(lambda _: DMD2(generator, streams=streams, **options), STEPS, name="dmd2"),
    ]
    return stages, {"batch_size": 16}


@pytest.mark.parametrize("name", PROCESSES)
def test_matching(name: str, tmp_path: Path) -> None:
    watch(*matching(name, tmp_path), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROCESSES)
def test_matching_on_a_gpu(name: str, tmp_path: Path) -> None:
    watch(*matching(name, tmp_path), tmp_path / "run", "cuda")


@pytest.mark.parametrize("settings", [{}, {"grad_accum_steps": 2}])
def test_reading_data_in_memory(settings: dict[str, Any]) -> None:
    """Over the end of an epoch, and over the rows that are gathered at once."""
    run = Run("nowhere", batch_size=8, device="cpu", **settings)
    feed = Shares({"train": Stream(pictures(), 8)}, run, World(torch.device("cpu"))).feed(0)
    next(feed)
    with NoSync():
        for _ in range(70):
            next(feed)


def test_a_stream_that_reads_labels_to_choose_rows_is_found() -> None:
    class Choosing(TensorData):
        def rows(self, index: Tensor) -> dict[str, Tensor]:
            return super().rows(index[self.columns["label"][index] >= 0])

    feed = Stream(Choosing(pictures(labelled=False).columns), 8).open(0, [(0, 8)], seed=0)
    with pytest.raises(HostSync, match="index with a mask"), NoSync():
        next(feed)


def test_hooks_of_the_test_leave_a_run_as_it_is(tmp_path: Path) -> None:
    """A watched run ends with the weights of an unwatched one."""
    ends = []
    for guarded in (False, True):
        stages, settings = miniature("adversarial")
        settings = settings | {"log_every": 100, "proof_window": PROOF, "progress": False, "device": "cpu"}
        with steady(NoSync if guarded else contextlib.nullcontext):
            ends.append(train(stages, Run(str(tmp_path / str(guarded)), **settings)).product.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
