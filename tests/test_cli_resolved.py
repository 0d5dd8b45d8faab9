"""`config.yaml` in a run folder: the whole truth, which repeats the run and survives a change of defaults."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from visiondistill import recipe_files, recipes, schema
from visiondistill.cli import main
from visiondistill.engine.assembly import Assembly, Kept
from visiondistill.engine.launch import World
from visiondistill.engine.settings import Optim, Run
from visiondistill.terms import CE

SHORT = ["--run.log_every", "5", "--run.progress", "false", "--run.proof_window", "2", "--run.checkpoint_every", "3"]
SHORT += ["--stages.teacher.steps", "6", "--stages.student.steps", "6", "--run.device", "cpu", "--run.keep", "9"]
LAST = "step_000000012"


def train(recipe: str | Path, folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    assert main(["train", "--recipe", str(recipe), "--run.output_dir", str(folder), *words]) == 0
    files = sorted((folder / "checkpoints" / LAST).glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("first") / "run"
    return folder, train("smoke/kd", folder, *SHORT)


def test_the_run_folders_config_repeats_the_run_to_the_bit(first, tmp_path):
    folder, tensors = first
    assert equal(train(folder / "config.yaml", tmp_path / "again"), tensors)
    assert not equal(train(folder / "config.yaml", tmp_path / "other", "--run.seed", "1"), tensors)


def test_a_later_change_of_a_default_cannot_change_it(first, tmp_path, monkeypatch):
    folder, tensors = first
    assert CE.__init__.__defaults__ == (0.0, "main")
    monkeypatch.setattr(CE.__init__, "__defaults__", (0.3, "main"))
    monkeypatch.setattr(Optim.__init__, "__defaults__", ("adamw", 1e-3, 0.0, 0.01, "constant", 0, {}))
    assert equal(train(folder / "config.yaml", tmp_path / "again"), tensors)
    assert not equal(train("smoke/kd", tmp_path / "changed", *SHORT), tensors), "the new default would have shown"


def test_a_killed_run_goes_on_from_its_own_config(first, tmp_path):
    folder, tensors = first
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for name in (LAST, "step_000000009"):
        shutil.rmtree(copy / "checkpoints" / name)
    assert json.loads((copy / "checkpoints" / "step_000000006" / "meta.json").read_text())["stage"] == 0
    assert equal(train(copy / "config.yaml", copy, "--run.resume", "auto"), tensors)


def test_a_run_without_measurements_keeps_its_config_too(tmp_path):
    changes = {"run.output_dir": str(tmp_path), "run.proof_window": 0, "run.progress": False}
    changes |= {"stages.teacher.steps": 1, "stages.student.steps": 1}
    config = recipes.override(recipes.load("smoke/kd"), changes)
    recipes.run(config)
    assert recipes.load(tmp_path / "config.yaml") == recipes.resolve(config) != config


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_resolves_to_itself_with_defaults(name):
    config = recipes.load(name)
    resolved = recipes.resolve(config)
    recipes.check(resolved)
    assert list(_leaves(recipes.resolve(resolved))) == list(_leaves(resolved))
    given, whole = dict(_leaves(config)), dict(_leaves(resolved))
    assert given.items() <= whole.items()
    assert whole.keys() >= {("run", option.name) for option in dataclasses.fields(Run)}
    stages = [("stages", name) for name in config["stages"]] if "stages" in config else [()]
    # Players that no entry names have the engine's defaults, which are defaults, too.
    assert whole.keys() >= {(*stage, "optim", "default", o.name) for stage in stages for o in dataclasses.fields(Optim)}
    for read in (recipe_files.parse, yaml.safe_load):
        assert list(_leaves(read(recipes.dump(resolved)))) == list(_leaves(resolved))


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("smoke/")])
def test_a_resolved_recipe_builds_what_the_recipe_does(name):
    config = recipes.load(name)
    told = []
    for each in (config, recipes.resolve(config)):
        stages, run = recipes.build(each)
        handover, described = None, []
        for stage in stages:
            method = stage.method(handover) if callable(stage.method) and described else stage.method
            assembly = Assembly(stage, method, run, World(torch.device("cpu")), Kept())
            described.append((assembly.describe(), assembly.fingerprint(), assembly.state))
            handover = method.handover()
        told.append((run, described))
    assert told[0][0] == told[1][0]
    for (one, frozen, state), (other, same, tensors) in zip(told[0][1], told[1][1], strict=True):
        assert one == other
        assert frozen == same
        assert equal(state, tensors)


def test_what_the_loader_fills_in_is_not_frozen():
    method = {"class_path": "visiondistill.Distiller", "init_args": {"terms": {}}}
    student = {"class_path": "visiondistill.models.Timm", "init_args": {"name": "test_resnet"}}
    config = {"student": student, "method": method, "steps": 1, "run": {"output_dir": "x", "batch_size": 1}}
    with_data = config | {"data": {"class_path": "visiondistill.data.EmbeddedDigits"}}
    for resolved in (recipes.resolve(with_data), recipes.resolve(config, given=("data",))):
        assert not {"num_classes", "input_size"} & set(resolved["student"]["init_args"])
        assert not {"student", "teacher", "streams"} & set(resolved["method"]["init_args"])
        assert resolved["workers"] == 0
    alone = recipes.resolve(config)
    assert alone["student"]["init_args"]["num_classes"] is None
    assert "workers" not in alone
    own = {"num_classes": 7, "input_size": [3, 8, 8]}
    asked = recipes.resolve(recipes.override(with_data, {f"student.{name}": value for name, value in own.items()}))
    assert asked["student"]["init_args"].items() >= own.items()


class Later:
    """Its first argument is what the stage before hands over."""

    def __init__(self, start: Any = None, pace: float = 1.0) -> None: ...


def test_a_handover_is_not_frozen():
    stage = {"steps": 1, "method": {"class_path": f"{__name__}.Later"}}
    config = {"stages": {"one": stage, "two": stage}, "run": {"output_dir": "x", "batch_size": 1}}
    stages = recipes.resolve(config)["stages"]
    assert stages["one"]["method"]["init_args"] == {"start": None, "pace": 1.0}
    assert stages["two"]["method"]["init_args"] == {"pace": 1.0}


@dataclass(frozen=True)
class Law:
    low: float = 0.0
    high: Sequence[float] = (1.0, 2.0)
    extra: dict[str, Any] = field(default_factory=dict)
    kept: list[int] = field(default_factory=lambda: [3])


class Odd:
    """Defaults of every kind."""

    def __init__(
        self,
        size: tuple[int, int] = (3, 4),
        shape: Sequence[int] = (1,),
        untyped=(1, 2),
        plain=2.5,
        law: Law | None = None,
        default_law: Law = Law(),
        activation: Callable = torch.relu,
        limit: float = float("inf"),
        unset=float("inf"),
        weight=torch.ones(2),  # noqa: B008
        wrong: int = "three",  # type: ignore[assignment]
        laws: Mapping[str, float | Law] | None = None,
        **more: Any,
    ) -> None:
        self.size, self.shape, self.untyped, self.law, self.laws = size, shape, untyped, law, laws


def test_defaults_that_no_file_can_say_stay_out():
    node = {"class_path": f"{__name__}.Odd", "init_args": {"more": 1, "laws": {"a": 2.0, "b": {"low": 1.0}}}}
    arguments = schema.complete(node, Any)["init_args"]
    law = {"low": 1.0, "high": [1.0, 2.0], "extra": {}, "kept": [3]}
    assert list(arguments.items()) == [
        *(("more", 1), ("laws", {"a": 2.0, "b": law})),
        *(("size", [3, 4]), ("shape", [1]), ("plain", 2.5), ("law", None)),
    ]
    built = schema.build({"class_path": node["class_path"], "init_args": arguments}, Any, "odd")
    assert (built.size, built.untyped) == ((3, 4), (1, 2))
    assert dataclasses.replace(built.laws["b"], high=(1.0, 2.0)) == Law(low=1.0)
    assert schema.complete(node, Any, left_out=("size", "law"))["init_args"].keys() == arguments.keys() - {
        "size",
        "law",
    }


def foreign_net(num_classes=10, depth=2, widths=(1, 2), **more):
    """What a user's own class may look like."""


def test_a_class_named_to_another_class_is_completed_too():
    path = "visiondistill.models.ClassPath"
    own = {"class_path": f"{__name__}.foreign_net", "init_args": {"more": 1}}
    arguments = schema.complete({"class_path": path, "init_args": own}, Any)["init_args"]
    # num_classes is for the outer class to hand on; a list would not be the tuple of the signature.
    assert arguments["init_args"] == {"more": 1, "depth": 2}
    assert arguments["class_path"] == own["class_path"]
    assert arguments["interpolation"] == "bilinear"
    bare = schema.complete({"class_path": path, "init_args": {"class_path": own["class_path"]}}, Any)
    assert bare["init_args"]["init_args"] == {"depth": 2}
    assert schema.complete(bare, Any) == bare


@pytest.mark.parametrize(
    "word", ["1e5", "no", "yes", "on", "null", "~", "2024-01-01", "1_000", "0x1f", "", "a: b", "ü"]
)
def test_words_stay_words_in_a_dumped_config(word):
    text = recipes.dump({"a": word, "same": [word, word]})
    for read in (recipe_files.parse, yaml.safe_load):
        assert read(text) == {"a": word, "same": [word, word]}
    assert "&" not in text


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Any:
    """(path, value) of every leaf, lists as one; in order, so that lists of them compare orders, too."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _leaves(value, (*path, name))
    else:
        yield path, repr(node)
