"""Each turn's loss is one graph, made once; a compiled run trains as an eager one does.

Every miniature compiles. What an author keeps out of a compiled loss: generators (`draw`) and peft's
`disable_adapter` (both belong in `prepare`), numbers of Python that change (each value is a graph), and
jvp through a norm, whose turn says `compile=False` (`flow_map` has no norm; `normed_flow_map` below).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from harness import Job, Outcome, apart, curves_apart, override, play, train_stages
from miniatures import MINIATURES, SPLITTABLE, Stages
from torch import Tensor, nn

from visiondistill.engine import Batch, Carry, Draw, Method, Terms, Turn


class Graphs(Counter[str]):
    """Graphs made, by where they were made: "turn" or "prepare"."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "turn"

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self[self.place] += 1
        return graph.forward

    def watch(self, method: Method, before: int = 0) -> None:
        kind = type(method)

        def prepare(method: Method, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
            self.place = "prepare"
            try:
                return kind.prepare(method, batch, draw, due)
            finally:
                self.place = "turn"

        override(method, prepare=prepare)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    counted = Graphs()
    torch._dynamo.reset()
    torch._dynamo.register_backend(counted.backend, name="counting")
    yield counted
    torch._dynamo.backends.registry._BACKENDS.pop("counting", None)
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counting")
    torch._dynamo.reset()


def run(stages: Stages, graphs: Graphs, folder: Path) -> tuple[Outcome, list[Method]]:
    methods: list[Method] = []

    def note(method: Method, before: int) -> None:
        methods.append(method)
        graphs.watch(method)

    settings = stages[1] | {"compile": True, "compile_backend": "counting"}
    return train_stages(stages[0], settings, folder, note), methods


@pytest.mark.parametrize("name", MINIATURES)
def test_one_graph_for_each_turn_over_fifty_steps(name: str, graphs: Graphs, tmp_path: Path) -> None:
    outcome, methods = run(MINIATURES[name](0, 50), graphs, tmp_path)
    assert not outcome.error
    assert graphs["turn"] == sum(len(method.turns()) for method in methods)
    assert graphs["prepare"] <= sum(len(method.frozen) for method in methods)
    eager = play(Job("eager", name, steps=50), tmp_path)
    assert apart(outcome.weights, eager.weights) < 1e-10
    assert curves_apart(outcome, eager) < 1e-10


def test_a_number_that_changes_in_the_loss_is_counted(graphs: Graphs, tmp_path: Path) -> None:
    stages, settings = MINIATURES["mutual"](0, 5)
    kind = type(stages[0].method)

    def prepare(self: Method, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        self.step = draw.step
        return batch

    def loss(self: Method, batch: Batch) -> tuple[Terms, Carry]:
        terms, carry = kind.loss(self, batch)
        return {name: term * self.step for name, term in terms.items()}, carry

    override(stages[0].method, prepare=prepare, loss=loss)
    run((stages, settings), graphs, tmp_path)
    assert graphs["turn"] > 1


def normed_flow_map(steps: int) -> Stages:
    stages, settings = MINIATURES["flow_map"](0, steps)
    method, kind = stages[0].method, type(stages[0].method)
    inner = method.players["student"].inner
    inner.insert(1, nn.LayerNorm(12, dtype=torch.float64))

    def turns(self: Method) -> tuple[Turn, ...]:
        return tuple(replace(turn, compile=False) for turn in kind.turns(self))

    override(method, turns=turns)
    return stages, settings


def test_a_turn_that_cannot_compile_runs_eagerly_in_a_compiled_run(graphs: Graphs, tmp_path: Path) -> None:
    outcome, _ = run(normed_flow_map(10), graphs, tmp_path / "compiled")
    assert not outcome.error
    assert graphs["turn"] == 1  # the frozen teacher's own
    eager = train_stages(*normed_flow_map(10), tmp_path / "eager")
    assert apart(outcome.weights, eager.weights) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITTABLE)
def test_inductor_trains_as_eager_does(name: str, tmp_path: Path) -> None:
    """Dropout draws other numbers under inductor, so the miniatures that have it are left out."""
    torch._dynamo.reset()
    eager = play(Job("eager", name), tmp_path)
    compiled = play(Job("compiled", name, settings={"compile": True}), tmp_path)
    assert not compiled.error
    assert apart(compiled.weights, eager.weights) < 1e-9
    assert curves_apart(compiled, eager) < 1e-9
