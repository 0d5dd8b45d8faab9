"""Mixed precision: what fp16's scale does, what bf16 keeps in full precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from visiondistill.data import Stream, TensorData
from visiondistill.engine import Draw, Method, Optim, Run, Stage, Turn, train
from visiondistill.engine.ema import Ema
from visiondistill.engine.errors import NonFinite


class Scaled(Method):
    """A linear fit whose loss is multiplied by `factor`, or by infinity at step `poison`."""

    def __init__(self, factor: float = 1.0, poison: int | None = None) -> None:
        torch.manual_seed(0)
        x = torch.randn(32, 8)
        stream = Stream(TensorData({"x": x, "y": x.sum(1, keepdim=True)}), batch_size=16)
        super().__init__({"line": nn.Linear(8, 1)}, streams={"train": stream})
        self.factor, self.poison, self.weights, self.kinds = factor, poison, [], set()

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("fit", self.loss, moves=("line",)),)

    def prepare(self, batch: dict, draw: Draw, due: frozenset[str]) -> dict:
        self.weights.append(self.players["line"].weight.detach().clone())
        batch["factor"] = torch.tensor(float("inf") if draw.step == self.poison else self.factor)
        return batch

    def loss(self, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        line = self.players["line"](batch["train"]["x"])
        self.kinds.add(line.dtype)
        return {"mse": (line.float() - batch["train"]["y"]).square().mean() * batch["factor"]}, {}


def fit(folder: Path, method: Scaled, precision: str, steps: int = 60):
    run = Run(str(folder), batch_size=16, mixed_precision=precision, progress=False, log_every=10, device="cpu")
    return train([Stage(method, steps, {"line": Optim(lr=1e-2)})], run)


@pytest.mark.parametrize(
    ("precision", "kind"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_losses_run_in_the_precision_asked_for_and_learn(tmp_path: Path, precision: str, kind: torch.dtype) -> None:
    method = Scaled()
    history = fit(tmp_path, method, precision, 200).history
    assert method.kinds == {kind}
    assert history[-1]["fit/mse"] < history[0]["fit/mse"] / 4


def test_an_fp16_overflow_lowers_the_scale_and_skips(tmp_path: Path) -> None:
    method = Scaled(factor=100.0)
    fit(tmp_path, method, "fp16")
    moved = [not torch.equal(a, b) for a, b in zip(method.weights, method.weights[1:], strict=False)]
    skipped = moved.index(True)
    assert skipped >= 1, "the first updates overflow at the initial scale"
    assert all(moved[skipped:])
    scales = load_file(tmp_path / "checkpoints" / "step_000000060" / "scales.safetensors")
    assert scales["fit.scale"].item() == 2.0 ** (16 - skipped)


def test_a_term_that_is_not_finite_stops_even_under_fp16(tmp_path: Path) -> None:
    method = Scaled(poison=23)
    with pytest.raises(NonFinite, match="step 23"):
        fit(tmp_path, method, "fp16")
    assert torch.equal(method.weights[23], method.players["line"].weight)


def test_the_average_of_a_bf16_network_keeps_what_bf16_cannot() -> None:
    product = nn.Linear(4, 4).to(torch.bfloat16)
    nn.init.zeros_(product.weight)
    average = Ema(product, decay=0.999)
    nn.init.ones_(product.weight)
    for _ in range(200):
        average.update(torch.zeros(()))
    assert average.values[0].dtype == torch.float32
    assert average.values[0].allclose(torch.full((4, 4), 1 - 0.999**200), rtol=1e-4)


def test_deterministic_kernels_are_asked_for_during_the_run_alone(tmp_path: Path) -> None:
    seen = []

    class Looking(Scaled):
        def prepare(self, batch: dict, draw: Draw, due: frozenset[str]) -> dict:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().prepare(batch, draw, due)

    for wanted in (True, False):
        run = Run(str(tmp_path / f"{wanted}"), 16, progress=False, device="cpu", deterministic=wanted)
        train([Stage(Looking(), 1)], run)
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
