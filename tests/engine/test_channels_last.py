"""Channels last: another layout of the same numbers, through every tensor that a run keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from harness import Job, apart, curves_apart, play_all, spawn
from torch import Tensor, nn

from visiondistill import Distiller, Optim, Run, Stage, train
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Result
from visiondistill.engine.errors import ResumeError
from visiondistill.export import export_run
from visiondistill.models import Network, SmallConvNet, Timm
from visiondistill.terms import CE, KL

STEPS, STOP = 8, 5
CONVOLVING = ["hint", "projected", "bilevel"]
"""Miniatures with convolutions: plain turns, gradients by group, gradients of gradients."""
ALIKE = 1e-10
"""Rounding of float64 over a few updates; layouts sum in other orders."""


class Volumes(nn.Module):
    """Convolutions of three dimensions over the image and its mirror."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, (2, 3, 3), bias=False)
        self.norm, self.head = nn.BatchNorm3d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.stack([x, x.flip(-1)], dim=2)).relu()
        return self.head(self.norm(self.second(x)).relu().mean((-3, -2, -1)))


def data(dtype: torch.dtype) -> TensorData:
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(32, 3, 12, 12, generator=draw, dtype=torch.float64).to(dtype)
    return TensorData({"image": image, "label": torch.arange(32) % 3})


def student(kind: str) -> nn.Module:
    if kind == "volumes":
        return Volumes()
    return SmallConvNet([8, 16], norm="batch", in_channels=3, num_classes=3)


def play(
    folder: Path,
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
    weights: int = 0,
    kind: str = "small",
    optimizer: str = "adamw",
    **settings,
) -> tuple[Distiller, Result]:
    torch.manual_seed(weights)
    made = student(kind)
    torch.manual_seed(100)
    teacher = Network(SmallConvNet([8], in_channels=3, num_classes=3)).to(dtype)
    method = Distiller(
        teacher,
        student=Network(made).to(dtype),
        terms={"ce": CE(), "kd": KL()},
        streams={"train": Stream(data(dtype), batch_size=8)},
    )
    options = {"batch_size": 8, "device": "cpu", "ema_decay": 0.9, "log_every": 1, "progress": False, "keep": 5}
    run = Run(str(folder), channels_last=channels_last, **options | {"checkpoint_every": STOP} | settings)
    optim = {"student": Optim(optimizer, lr=1e-2, schedule="cosine", warmup=2)}
    return method, train([Stage(method, STEPS, optim)], run)


def convolutions(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]


def layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d


def is_laid_out(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=layout(tensor)) and not tensor.is_contiguous()


@pytest.mark.parametrize("kind", ["small", "volumes"])
def test_weights_features_and_averages_have_the_layout(tmp_path: Path, kind: str):
    seen: list[Tensor] = []
    made = play(tmp_path / "plain", channels_last=False, kind=kind)
    assert not any(is_laid_out(conv.weight) for conv in convolutions(made[0]))

    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: seen.append(out) if isinstance(module, nn.Conv2d | nn.Conv3d) else None
    )
    try:
        method, result = play(tmp_path / "run", kind=kind)
    finally:
        handle.remove()
    for network in (*method.players.values(), *method.frozen.values(), result.ema):
        assert convolutions(network)
        assert all(is_laid_out(conv.weight) for conv in convolutions(network))
    assert all(is_laid_out(features) for features in seen), "features follow the weights"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_the_result_is_that_of_the_plain_layout_within_rounding(tmp_path: Path, optimizer: str):
    options = {"dtype": torch.float64, "optimizer": optimizer}
    plain, plain_result = play(tmp_path / "plain", channels_last=False, **options)
    laid, laid_result = play(tmp_path / "laid", **options)
    for ours, theirs in ((laid, plain), (laid_result.ema, plain_result.ema)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=ALIKE, atol=ALIKE, msg=name)
    for ours, theirs in zip(laid_result.history, plain_result.history, strict=True):
        assert ours["student/kd"] == pytest.approx(theirs["student/kd"], rel=ALIKE)


def test_three_dimensions_give_the_plain_result_too(tmp_path: Path):
    options = {"dtype": torch.float64, "kind": "volumes"}
    (plain, _), (laid, _) = (play(tmp_path / str(last), channels_last=last, **options) for last in (False, True))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(laid.state_dict()[name], tensor, rtol=ALIKE, atol=ALIKE, msg=name)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory):
    jobs = [Job(name, name, settings={"channels_last": True}) for name in CONVOLVING]
    return spawn(jobs, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CONVOLVING)
def test_every_kind_of_turn_and_two_processes_give_the_plain_result(tmp_path: Path, name: str, by_two):
    jobs = [Job(f"{name}-{last}", name, settings={"channels_last": last}) for last in (False, True)]
    plain, laid = play_all(jobs, tmp_path).values()
    for found in (laid, by_two[name][0]):
        assert not found.error
        assert apart(found.weights, plain.weights) < ALIKE
        assert apart(found.ema, plain.ema) < ALIKE
        assert curves_apart(found, plain) < ALIKE


@pytest.mark.parametrize("kind", ["small", "volumes"])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, kind: str):
    whole, whole_result = play(tmp_path / "whole", kind=kind)
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step_{STOP:09d}"
    # Other initial weights: all that matters must come from the checkpoint.
    again, again_result = play(tmp_path / "again", kind=kind, weights=7, resume=str(checkpoint))
    for ours, theirs in ((again, whole), (again_result.ema, whole_result.ema)):
        assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    tail = [line["student/kd"] for line in whole_result.history if line["step"] > STOP]
    assert tail
    assert [line["student/kd"] for line in again_result.history if line["step"] > STOP] == tail
    assert all(is_laid_out(conv.weight) for conv in convolutions(again))


def test_a_run_does_not_go_on_in_another_layout(tmp_path: Path):
    play(tmp_path / "run")
    with pytest.raises(ResumeError, match="channels_last"):
        play(tmp_path / "other", channels_last=False, resume=str(tmp_path / "run"))


def test_an_export_is_contiguous_and_opens_bit_equal(tmp_path: Path):
    torch.manual_seed(0)
    network = Timm("test_resnet", num_classes=3, input_size=(3, 32, 32))
    terms, streams = {"ce": CE()}, {"train": Stream(data(torch.float32), batch_size=8)}
    method = Distiller(student=network, terms=terms, streams=streams)
    run = Run(str(tmp_path / "run"), batch_size=8, device="cpu", channels_last=True, progress=False)
    result = train([Stage(method, 2, {"student": Optim(lr=1e-3)})], run)
    product = result.product.eval()
    assert is_laid_out(convolutions(product)[0].weight)
    exported = export_run(result, classes=["a", "b", "c"], input_size=(3, 12, 12))
    assert exported.format == "timm"
    assert exported.largest_difference == {"timm": 0.0}
    opened = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    assert all(tensor.is_contiguous() for tensor in opened.state_dict().values())
    assert is_laid_out(convolutions(product)[0].weight), "the run's own network stays as it is"
    weights = {name.removeprefix("model."): tensor for name, tensor in product.state_dict().items()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in opened.state_dict().items())
    images = network.prepare(torch.rand(4, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(opened(images), product.model(images), rtol=1e-4, atol=1e-5)
