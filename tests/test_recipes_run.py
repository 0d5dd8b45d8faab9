"""Every recipe trains: from its file, with its own classes, on images of a few pixels for a few steps."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import toy_vae
from PIL import Image
from torch import Tensor, nn

from visiondistill import Distiller, Optim, Run, Stage, cli, recipes, schema, train, workbench
from visiondistill.data import ImageFolder, Stream
from visiondistill.models import Network
from visiondistill.teachers import store_targets
from visiondistill.terms import CE

pytestmark = pytest.mark.usefixtures("undrawn_reports")

TINY = "test_resnet"
"""In place of timm models that are large or come with weights from a network."""
CLASSES, SIZE = 10, 16
"""As many classes as the published nets of CIFAR-10 tell apart; images of so many pixels a side."""
INPUT = [3, 32, 32]
"""Of the timm models: half of it, and their last stage would have maps of one pixel to halve."""
STEPS = 6
"""Of each stage; a turn that is due at every fifth step is due within them."""


def picture(label: int, draw: np.random.Generator) -> Image.Image:
    """Noise over a colour for each class."""
    colour = [255 * (label >> bit & 1) for bit in (0, 1, 2)] if label < 8 else [128, 128, 255 * (label - 8)]
    noise = draw.integers(-40, 40, (SIZE, SIZE, 3))
    return Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small set, training and test images, as a folder and as parquet files."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 3)):
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for label in range(CLASSES):
            folder = root / "folder" / split / f"class {label}"
            folder.mkdir(parents=True)
            for index in range(count):
                file = io.BytesIO()
                picture(label, draw).save(file, "PNG")
                (folder / f"{index}.png").write_bytes(file.getvalue())
                rows["image"].append({"bytes": file.getvalue(), "path": f"{index}.png"})
                rows["label"].append(label)
        save(rows, root / "parquet" / f"{split}-00000-of-00001.parquet")
    return {"ImageFolder": root / "folder", "Parquet": root / "parquet"}


def save(rows: dict[str, list[Any]], path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"label": {"names": [f"class {label}" for label in range(CLASSES)], "_type": "ClassLabel"}}
    table = pa.table(rows).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
    pq.write_table(table, path)


def small(node: dict[str, Any]) -> dict[str, Any]:
    """A network of the recipe's own class, small, and without weights that are elsewhere."""
    own = {key: value for key, value in node["init_args"].items() if key not in ("pretrained", "weights")}
    if is_timm(node):
        own.pop("options", None)  # of another model
        # A student with a distillation token stays one.
        token = {"name": own["name"], "options": {"depth": 3, "embed_dim": 24}}
        own |= {"input_size": INPUT} | (token if "distilled" in own["name"] else {"name": TINY})
    elif "input_size" in own:
        own["input_size"] = [3, SIZE, SIZE]
    return {"class_path": node["class_path"], "init_args": own}


def is_timm(node: dict[str, Any]) -> bool:
    return not str(node["init_args"].get("name", "cifar_")).startswith("cifar_")


def with_small_networks(node: Any) -> Any:
    """A method's node, the timm models within it small and of the set's classes, as a peer has to be told."""
    if not isinstance(node, dict):
        return node
    if node.get("class_path") == "visiondistill.models.Timm":
        made = small(node)
        return made | {"init_args": made["init_args"] | {"num_classes": CLASSES}}
    return {name: with_small_networks(value) for name, value in node.items()}


def with_roots(node: Any, roots: dict[str, Path]) -> Any:
    """A data node that reads the small set; sources that make their images up stay as they are."""
    if not isinstance(node, dict):
        return node
    root = roots.get(node.get("class_path", "").rpartition(".")[2])
    changed = {name: with_roots(value, roots) for name, value in node.items()}
    return changed if root is None else changed | {"init_args": changed["init_args"] | {"root": str(root)}}


def without_warmup(node: Any) -> Any:
    """A method's node whose turns begin at the second step, where a recipe lets them wait."""
    if not isinstance(node, dict):
        return node
    return {name: 1 if name == "warmup" else without_warmup(value) for name, value in node.items()}


def with_vae(node: Any, folder: Path) -> Any:
    """A method's node, an autoencoder that it names in place, toy weights in its folder."""
    if not isinstance(node, dict):
        return node
    return {name: toy_vae(folder) if name == "vae" else with_vae(value, folder) for name, value in node.items()}


class School:
    """Networks of a recipe's own class that have learnt the small set, each once."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.data, self.folder = ImageFolder(str(root), test_fraction=0).train(), folder
        self.known: dict[str, dict[str, Any]] = {}

    def taught(self, node: dict[str, Any]) -> dict[str, Any]:
        """`node`, small, with weights from a file."""
        made = small(node)
        bare = {key: value for key, value in made["init_args"].items() if key not in ("new_head", "trainable")}
        if is_timm(node):
            bare["num_classes"] = CLASSES
        seen = json.dumps(bare, sort_keys=True)
        if seen not in self.known:
            folder = self.folder / str(len(self.known))
            self._teach(schema.build({"class_path": made["class_path"], "init_args": bare}, Any, "network"), folder)
            self.known[seen] = {"weights": str(folder / "weights.pth")}
        made["init_args"] |= self.known[seen] | ({"pretrained": False} if is_timm(node) else {})
        return made

    def _teach(self, network: Network, folder: Path) -> None:
        method = Distiller(student=network, terms={"ce": CE()}, streams={"train": Stream(self.data, 20)})
        run = Run(str(folder), batch_size=20, device="cpu", progress=False, proof_window=0)
        train([Stage(method, 40, {"student": Optim(lr=5e-3, schedule="cosine")})], run)
        torch.save(network.model.state_dict(), folder / "weights.pth")


@pytest.fixture(scope="module")
def school(roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> School:
    torch.manual_seed(0)
    return School(roots["ImageFolder"], tmp_path_factory.mktemp("school"))


def shrunk(config: dict[str, Any], roots: dict[str, Path], school: School, folder: Path) -> dict[str, Any]:
    """The recipe with everything large replaced, and everything that it says of the method left as it is."""
    changes: dict[str, Any] = {"run.output_dir": str(folder / "run"), "run.device": "cpu", "run.progress": False}
    changes |= {"run.log_every": 2, "run.proof_window": 2}
    changes |= {f"stages.{name}.steps": STEPS for name in config.get("stages", {})} or {"steps": STEPS}
    for name, stage in config.get("stages", {}).items():
        changes[f"stages.{name}.method"] = without_warmup(stage["method"])
    data = with_roots(config.get("data", {}), roots)
    if data != config.get("data", {}):
        learnt = config["student"]["init_args"]
        begins = learnt.get("pretrained") or learnt.get("weights")
        student = school.taught(config["student"]) if begins else small(config["student"])
        changes |= {"data": data, "run.batch_size": 20, "student": student}
        if "method" in config:
            changes["method"] = without_warmup(with_vae(with_small_networks(config["method"]), folder / "vae"))
    if is_stored(config):
        changes["teacher.file"] = stored(changes["data"], folder / "teacher.safetensors")
    elif "teacher" in config:
        changes["teacher"] = school.taught(config["teacher"])
    return recipes.override(config, changes)


def is_stored(config: dict[str, Any]) -> bool:
    return config.get("teacher", {}).get("class_path") == "visiondistill.teachers.Stored"


class Colours(nn.Module):
    """Tells the small set's classes by `picture`'s colours."""

    num_classes = CLASSES

    def forward(self, x: Tensor) -> Tensor:
        bits = [[label >> bit & 1 for bit in (0, 1, 2)] for label in range(8)]
        return -torch.cdist(x.mean((2, 3)), torch.tensor([*bits, [0.5, 0.5, 0], [0.5, 0.5, 1]]))


def stored(data: dict[str, Any], file: Path) -> str:
    store_targets(Colours(), recipes.source_of({"data": data}), file)
    return str(file)


def terms_of(config: dict[str, Any]) -> list[str]:
    nodes = [stage["method"] for stage in config["stages"].values()] if "stages" in config else [config["method"]]
    return [name for node in nodes for name in node.get("init_args", {}).get("terms", {})]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_trained(outcome: workbench.Outcome, config: dict[str, Any]) -> None:
    assert outcome.result.reason == "finished"
    assert outcome.result.step == STEPS * len(config.get("stages", "1"))
    values = {name: value for line in lines(outcome.folder) for name, value in line.items() if "/" in name}
    assert all(map(math.isfinite, values.values()))
    assert {name.rpartition("/")[2] for name in values} >= set(terms_of(config))
    if "data" in config:
        assert outcome.exported is not None
        assert outcome.metrics["n"] > 0
        assert (outcome.facts.teacher_accuracy is not None) == ("teacher" in config and not is_stored(config))


def makes_classifiers(name: str) -> bool:
    """Recipes of generators, and of who judges them, run in `diffusion/`: `test_method_recipes`, `test_one_step`."""
    return "diffusion.methods" not in recipes.dump(recipes.load(name)) and "fashion16" not in name


@pytest.mark.parametrize("name", filter(makes_classifiers, recipes.names()))
def test_a_recipe_runs(name: str, roots: dict[str, Path], school: School, tmp_path: Path) -> None:
    config = shrunk(recipes.load(name), roots, school, tmp_path)
    outcome = workbench.run(config)
    assert_trained(outcome, config)
    saved = recipes.load(outcome.folder / "config.yaml")
    assert saved["run"].items() >= config["run"].items(), "what was run is what is saved"
    learns = "data" in config and "augmentor" in (outcome.folder / "metrics.jsonl").read_text()
    assert (outcome.folder / "edits.png").is_file() == learns


# The commands that stand in the recipes of `measured/`, on parts of the real sets: minutes, therefore slow.

SUBSET = 150
"""Training images, and a third as many test images, of the real sets in the tests of `measured/`."""
MEASURED = [
    name
    for name in recipes.names()
    if name.startswith("measured/")
    and makes_classifiers(name)
    and "root" in recipes.load(name)["data"].get("init_args", {})
    # The stored logits of these belong to the whole set.
    and not name.startswith("measured/dhkd_")
]


@pytest.fixture(scope="module")
def measured_place(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with DATA as the recipes' commands have it: the published weights, and a part of each set's images."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    place, given = tmp_path_factory.mktemp("measured"), shared_dir / "data"
    needed = ["weights/cifar10_resnet", "weights/efficientnet_lite", "caltech101_128", "cifar10"]
    if missing := [name for name in needed if not (given / name).is_dir()]:
        pytest.skip(f"no {', '.join(missing)} in {given}")
    for name in ("caltech101_128", "cifar10"):
        (place / "DATA" / name).mkdir(parents=True)
        for split, count in (("train", SUBSET), ("test", SUBSET // 3)):
            table = pa.concat_tables(pq.read_table(path) for path in sorted((given / name).glob(f"{split}-*.parquet")))
            rows = np.linspace(0, len(table) - 1, count).astype(int)
            pq.write_table(table.take(rows), place / "DATA" / name / f"{split}-00000-of-00001.parquet")
    (place / "DATA" / "weights").symlink_to(given / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


def command_of(name: str) -> list[str]:
    """The words of the command in the recipe's comment."""
    (line,) = (line for line in recipes.about(name).splitlines() if line.startswith("visiondistill "))
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def measured(measured_place: Path) -> dict[str, Path]:
    """Run folders of the recipes, by the command in each one's comment, teachers first."""
    folders = {}
    short = ["--run.device", "cpu", "--run.batch_size", "16", "--run.proof_window", "2", "--run.progress", "false"]
    for name in sorted(MEASURED, key=lambda name: ("teacher" in recipes.load(name), name)):
        few = ["--steps", "16", "--optim.student.lr", "0.02"] if name.endswith("teacher") else ["--steps", "3"]
        words = command_of(name)
        assert words[:3] == ["train", "--recipe", name]
        assert cli.main([*words, *short, *few]) == 0, name
        out = recipes.parse_overrides(words[1:]).get("run.output_dir", recipes.load(name)["run"]["output_dir"])
        folders[name] = measured_place / out
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_recipe_runs_by_its_own_command(name: str, measured: dict[str, Path]) -> None:
    folder = measured[name]
    facts = json.loads((folder / "preflight.json").read_text())
    told = json.loads((folder / "evaluation" / "accuracy.json").read_text())
    assert (facts["data"]["splits"]["test"]["used"], told["n"]) == (SUBSET // 3, SUBSET // 3)
    exported = json.loads((folder / "export" / "export.json").read_text())
    assert exported["preprocessing"]["input_size"] == facts["student"]["input_size"]
    if name == "measured/cifar10_kd":
        assert facts["teacher_accuracy"] > 0.8, "a published teacher, loaded and fed as it was made"
