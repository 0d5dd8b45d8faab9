"""A package outside this repository, with parts of its own for every axis, trained from a recipe alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visiondistill.cli import main
from visiondistill.export.reopen import open_export

ROOT = Path(__file__).resolve().parent.parent

FILES = {
    "__init__.py": "",
    "data.py": '''
import torch

from visiondistill.data import Source, TensorData, split_of


def quadrants(count, seed):
    """Noise, and one quadrant that is brighter: its number is the label."""
    draw = torch.Generator().manual_seed(seed)
    image = 0.6 * torch.rand(count, 1, 8, 8, generator=draw)
    label = torch.arange(count) % 4
    for row, number in enumerate(label.tolist()):
        down, right = 4 * (number // 2), 4 * (number % 2)
        image[row, :, down : down + 4, right : right + 4] += 0.25
    return TensorData({"image": image.clamp(0, 1), "label": label})


class Quadrants(Source):
    """Images of 8x8 pixels.

    Args:
        count: training images.
        val_fraction: of them.
    """

    def __init__(self, count: int = 160, val_fraction: float = 0.25) -> None:
        splits = {"train": split_of(quadrants(count, 0)), "test": split_of(quadrants(80, 1))}
        names = ["north west", "north east", "south west", "south east"]
        super().__init__(splits, names, (1, 8, 8), val_fraction=val_fraction)


class Pairs(torch.utils.data.Dataset):
    """The same as a plain map-style data set.

    Args:
        count: images.
        seed: of the noise.
    """

    classes = ("a", "b", "c", "d")

    def __init__(self, count: int, seed: int = 0) -> None:
        self.rows = quadrants(count, seed).columns

    def __len__(self) -> int:
        return len(self.rows["label"])

    def __getitem__(self, index):
        return self.rows["image"][index], int(self.rows["label"][index])
''',
    "teachers.py": '''
import torch
from torch import nn

from visiondistill.teachers import Teacher


class Brightest(nn.Module):
    """Compares the means of the quadrants; nothing of it was trained.

    Args:
        sharpness: of its answers, > 0.

    Raises:
        ValueError: it is not.
    """

    num_classes = 4

    def __init__(self, sharpness: float = 20.0) -> None:
        super().__init__()
        if sharpness <= 0:
            raise ValueError(f"sharpness must be > 0, got {sharpness}")
        self.sharpness = sharpness

    def forward(self, images):
        return self.sharpness * nn.functional.adaptive_avg_pool2d(images, 2).mean(1).flatten(1)


class Darkest(Brightest):
    """As wrong as can be."""

    def forward(self, images):
        return -super().forward(images)


class Answers(Teacher):
    """A source of targets rather than a network."""

    num_classes = 4

    def __init__(self, sharpness: float = 20.0) -> None:
        super().__init__()
        self.rule = Brightest(sharpness)

    def targets(self, data):
        return {"logits": self.rule(data["image"])}
''',
    "terms.py": '''
from torch import Tensor
from torch.nn.functional import cosine_similarity

from visiondistill.terms import Needs, Term, View


class Cosine(Term):
    """One minus the cosine between centred logits.

    Args:
        margin: below which a row counts nothing.
        scale: of the value.
    """

    def __init__(self, margin: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale
        self.needs = Needs(teacher_logits=True)

    def forward(self, view: View) -> Tensor:
        ours, theirs = (each - each.mean(1, keepdim=True) for each in (view.logits, view.teacher_logits))
        return self.scale * (1 - cosine_similarity(ours, theirs) - self.margin).relu()
''',
    "weighting.py": '''
from collections.abc import Mapping

from visiondistill.weighting import Weighting


class Shares(Weighting):
    """Weights that are shares of one.

    Args:
        parts: of each term.
    """

    def __init__(self, parts: Mapping[str, float]) -> None:
        super().__init__()
        self.parts = {name: part / sum(parts.values()) for name, part in parts.items()}

    def forward(self, values, view):
        return {name: self.parts[name] * value.mean() for name, value in values.items()}
''',
    "augment.py": '''
from visiondistill.parts import Part


class Dim(Part):
    """Each image darker by a share of its own.

    Args:
        most: greatest share, in [0, 1].
    """

    def __init__(self, most: float = 0.2) -> None:
        super().__init__()
        self.most = most

    def prepare(self, batch, draw, due):
        images = batch["train"]["image"]
        share = self.most * draw.uniform("dim", 1).to(images.dtype)
        return batch | {"train": batch["train"] | {"image": images * (1 - share[:, :, None, None])}}
''',
    "recipe.yaml": """
# The parts of this package.
base: kd
data: {class_path: plant.data.Quadrants, init_args: {count: 160}}
student: {class_path: visiondistill.models.SmallMLP, init_args: {in_features: 64, hidden: [32]}}
teacher: {class_path: plant.teachers.Brightest, init_args: {sharpness: 20.0}}
method:
  init_args:
    terms:
      kd: null
      cosine: {class_path: plant.terms.Cosine}
    weighting: {class_path: plant.weighting.Shares, init_args: {parts: {ce: 1, cosine: 3}}}
    augmentor: {class_path: plant.augment.Dim, init_args: {most: 0.3}}
steps: 60
optim:
  student: {lr: 2e-2, warmup: 5}
run: {output_dir: runs/plant, batch_size: 16, log_every: 10, device: cpu, progress: false}
""",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `plant`."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "plant").mkdir()
    for name, text in FILES.items():
        (folder / "plant" / name).write_text(text.lstrip("\n"))
    return folder


@pytest.fixture(scope="module")
def trained(outside: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, made as its author makes it: on the command line, from a folder of their own."""
    work = tmp_path_factory.mktemp("work")
    command = [sys.executable, "-m", "visiondistill", "train", "--recipe", str(outside / "plant" / "recipe.yaml")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(outside), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return work / "runs" / "plant"


def test_it_trains_from_the_config_alone(trained: Path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    curves = {name: [line[name] for line in lines if name in line] for name in ("student/ce", "student/cosine")}
    assert curves["student/cosine"][-1] < curves["student/cosine"][0] / 2
    assert curves["student/ce"][-1] < curves["student/ce"][0]
    assert json.loads((trained / "evaluation" / "accuracy.json").read_text())["accuracy"] > 0.9


def test_its_own_teacher_is_measured_before_the_first_step(trained: Path):
    facts = json.loads((trained / "preflight.json").read_text())
    assert facts["teacher"]["name"] == "Brightest"
    assert facts["teacher_images"] == 40
    assert facts["teacher_accuracy"] == 1.0
    told = json.loads((trained / "evaluation" / "accuracy.json").read_text())
    assert told["teacher"]["accuracy"] == 1.0
    assert facts["data"]["source"] == "Quadrants"


def test_its_export_opens(trained: Path):
    network, facts = open_export(trained / "export")
    assert facts["classes"] == ["north west", "north east", "south west", "south east"]
    image = torch.full((1, 1, 8, 8), 0.3)
    image[..., 4:, :4] = 0.9
    assert network(image).logits.argmax().item() == 2


def plant(outside: Path, *words: str) -> int:
    return main(["train", "--recipe", str(outside / "plant" / "recipe.yaml"), *words])


@pytest.fixture
def importable(outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(outside))
    monkeypatch.chdir(tmp_path)
    return outside


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--method.terms.cosine.margim 1",
            "method.terms.cosine.margim: Cosine takes no such key (did you mean 'margin'?); it takes margin, scale",
        ),
        ("--method.terms.cosine.scale wide", "method.terms.cosine.scale: 'wide' does not fit float"),
        ("--method.terms.cosine.class_path plant.terms.Cosin", "plant.terms has no 'Cosin' (did you mean 'Cosine'?)"),
        ("--method.terms.cosine.class_path plant.teachers.Brightest", "Brightest is not a Term"),
        ("--method.weighting.part.ce 1", "method.weighting.part: Shares takes no such key (did you mean 'parts'?)"),
        ("--method.weighting.parts.ce much", "method.weighting.parts.ce: 'much' does not fit float"),
        ("--method.augmentor.mots 1", "method.augmentor.mots: Dim takes no such key (did you mean 'most'?)"),
        ("--teacher.sharpnes 1", "teacher.sharpnes: Brightest takes no such key (did you mean 'sharpness'?)"),
        ("--teacher.sharpness -1", "teacher: sharpness must be > 0, got -1"),
        ("--teacher.class_path plant.teacher.Brightest", "'plant.teacher.Brightest' cannot be imported"),
        ("--data.cuont 3", "data.cuont: Quadrants takes no such key (did you mean 'count'?); it takes count, val_"),
        ("--data.count many", "data.count: 'many' does not fit int"),
        ("--teacher.class_path plant.teachers.Darkest", "teacher: 0.0% on 40 validation images is chance (25.0%)"),
    ],
)
def test_what_is_wrong_in_it_is_named_by_its_own_names(
    importable: Path, words: str, said: str, capsys: pytest.CaptureFixture
):
    assert plant(importable, *words.split()) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ("train: {class_path: plant.data.Pairs, init_args: {count: 200}}", (164, 16, 20)),
        (
            "train: {class_path: plant.data.Pairs, init_args: {count: 80}}, "
            "val: {class_path: plant.data.Pairs, init_args: {count: 40, seed: 1}}, "
            "test: {class_path: plant.data.Pairs, init_args: {count: 40, seed: 2}}, in_memory: true",
            (80, 40, 40),
        ),
    ],
)
def test_a_plain_data_set_needs_no_source_of_its_own(
    importable: Path, data: str, sizes: tuple[int, int, int], capsys: pytest.CaptureFixture
):
    own = f"{{class_path: visiondistill.data.OwnData, init_args: {{{data}}}}}"
    assert plant(importable, "--data", own, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "OwnData: 4 classes (a, b, c, d), images 1x8x8" in told
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        assert f"{split}: {size} used" in told


def test_a_source_of_targets_may_stand_where_a_network_does(importable: Path, capsys: pytest.CaptureFixture):
    words = ["--teacher.class_path", "plant.teachers.Answers", "--steps", "5"]
    assert plant(importable, *words) == 0
    facts = json.loads(Path("runs/plant/preflight.json").read_text())
    assert (facts["teacher"]["name"], facts["teacher_accuracy"]) == ("Answers", 1.0)
