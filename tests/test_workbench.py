"""From a recipe to a measured and exported student, as a notebook and the command line do it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiondistill import recipes
from visiondistill.cli import main
from visiondistill.data import EmbeddedDigits, OwnData, TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.export.reopen import open_export
from visiondistill.models import SmallConvNet, count_flops
from visiondistill.schema import RecipeError
from visiondistill.workbench import distill

QUIET = {"run__progress": False, "run__device": "cpu", "run__log_every": 20}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "run"
    settings = {"steps": 120, "optim__student__lr": 1e-2, "run__output_dir": str(folder), **QUIET}
    return distill(SmallConvNet([16, 32]), None, EmbeddedDigits(), recipe="finetune", **settings)


def test_a_notebook_distils_in_one_call(teacher, tmp_path: Path) -> None:
    assert teacher.metrics["accuracy"] > 0.8
    student = SmallConvNet([8, 16])
    settings = {"steps": 100, "optim__student": {"lr": 1e-2}, "run__output_dir": str(tmp_path / "run"), **QUIET}
    outcome = distill(student, teacher.student, EmbeddedDigits(), recipe="kd", **settings)
    assert outcome.facts.teacher_accuracy > 0.8
    flops = [count_flops(net, (1, 8, 8)) for net in (teacher.student, student)]
    assert outcome.facts.ideal_step_cost == pytest.approx(1 + flops[0] / (3 * flops[1]))
    assert outcome.metrics["teacher"]["agreement"] > 0.5
    assert {path.name for path in outcome.folder.iterdir()} >= {
        *("config.yaml", "env.json", "metrics.jsonl", "preflight.json", "curves.png"),
        *("checkpoints", "evaluation", "export"),
    }
    pictures = {path.name for path in (outcome.folder / "evaluation").glob("*.png")}
    assert pictures == {"confusion.png", "reliability.png"}
    network, facts = open_export(outcome.folder / "export")
    images = EmbeddedDigits().test().rows(torch.arange(500))
    right = (network(images["image"]).logits.argmax(1) == images["label"]).sum().item()
    assert right == round(outcome.metrics["accuracy"] * 500)
    assert facts["classes"] == [str(digit) for digit in range(10)]


def test_settings_of_speed_are_picked_and_written_down(tmp_path: Path) -> None:
    settings = {"steps": 30, "run__output_dir": str(tmp_path / "run"), "run__compile_backend": "eager", **QUIET}
    outcome = distill(
        SmallConvNet([8]), None, EmbeddedDigits(), "finetune", performance="auto", run__evaluate_every=10, **settings
    )
    config = recipes.load(outcome.folder / "config.yaml")
    assert "performance" not in config
    assert {"mixed_precision", "channels_last", "compile"} <= set(config["run"])
    assert any("ms a step" in note for note in outcome.facts.notes)
    assert [line["step"] for line in outcome.result.history if "val/accuracy" in line] == [10, 20, 30]
    with pytest.raises(RecipeError, match="performance: 'fast'"):
        distill(SmallConvNet([8]), None, EmbeddedDigits(), "finetune", performance="fast", **settings)


def test_a_teacher_at_chance_stops_the_run_before_anything_is_written(tmp_path: Path) -> None:
    settings = {"steps": 5, "run__output_dir": str(tmp_path / "run"), **QUIET}
    with pytest.raises(SettingsError, match="is chance"):
        distill(SmallConvNet([8]), SmallConvNet([8]), EmbeddedDigits(), **settings)
    assert not (tmp_path / "run").exists()


class Brighter(torch.nn.Module):
    """Tells bright images from dark ones, or the other way round."""

    num_classes = 2

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = self.sign * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright], dim=1)


def test_a_handful_of_images_is_enough_for_a_teacher_that_is_right(tmp_path: Path) -> None:
    label = torch.arange(20) % 2
    image = (0.2 * torch.rand(20, 1, 8, 8) + 0.6 * label[:, None, None, None]).float()
    data = OwnData(TensorData({"image": image, "label": label}))
    assert len(data.val()) == 2
    settings = {"steps": 2, "run__batch_size": 4, **QUIET}
    student = SmallConvNet([4], num_classes=2)
    outcome = distill(student, Brighter(1.0), data, run__output_dir=str(tmp_path / "run"), **settings)
    assert outcome.facts.teacher_accuracy == 1.0
    with pytest.raises(SettingsError, match=r"0\.0% on 2 validation images is chance"):
        distill(student, Brighter(-1.0), data, run__output_dir=str(tmp_path / "other"), **settings)


def test_other_classes_than_the_data_are_refused(tmp_path: Path) -> None:
    settings = {"steps": 5, "run__output_dir": str(tmp_path / "run"), **QUIET}
    with pytest.raises(RecipeError, match=r"teacher: .*7 classes"):
        distill(SmallConvNet([8]), SmallConvNet([8], num_classes=7), EmbeddedDigits(), **settings)
    with pytest.raises(RecipeError, match="student: it has 7 classes, but the data has 10: give it num_classes 10"):
        distill(SmallConvNet([8], num_classes=7), SmallConvNet([8]), EmbeddedDigits(), **settings)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("1023456789", "class 0 is '0', but '1' in the teacher: names or their order differ"),
        ("01234567", "class 8 is '8', but none in the teacher"),
        ("0123456789X", "class 10 is none, but 'X' in the teacher"),
    ],
)
def test_other_class_names_than_the_datas_are_refused(names: str, told: str, tmp_path: Path) -> None:
    teacher = SmallConvNet([8])
    teacher.pretrained_cfg = {"label_names": list(names)}
    with pytest.raises(SettingsError, match=told):
        distill(SmallConvNet([8]), teacher, EmbeddedDigits(), run__output_dir=str(tmp_path / "run"), **QUIET)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12 grey images, told apart by their brightness."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, name in enumerate(["dark", "light", "medium"]):
        (root / name).mkdir()
        for index in range(12):
            level = {"dark": 40, "medium": 120, "light": 200}[name]
            pixels = generator.integers(level - 20, level + 20, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}_{index}.png")
    return root


def test_the_command_line_trains_on_a_folder_and_measures_again(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    words = ["finetune", "--data.root", str(photos), "--student.class_path", "visiondistill.models.SmallConvNet"]
    words += ["--student.widths", "[8]", "--student.in_channels", "3", "--student.num_classes", "3"]
    words += ["--steps", "40", "--optim.student.lr", "0.01"]
    words += ["--run.batch_size", "8", "--run.output_dir", str(run), "--run.device", "cpu"]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "3 classes (dark, light, medium)" in told
    assert "carved from train" in told
    assert not run.exists()
    assert main(words) == 0
    before = json.loads((run / "evaluation" / "accuracy.json").read_text())
    assert main(["evaluate", "accuracy", "--run", str(run), "--output_dir", str(tmp_path / "again")]) == 0
    after = json.loads((tmp_path / "again" / "accuracy.json").read_text())
    assert (after["accuracy"], after["n"]) == (before["accuracy"], before["n"])


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods"]) == 0
    assert "kd " in capsys.readouterr().out
    assert main(["methods", "kd"]) == 0
    assert "temperature: 4.0" in capsys.readouterr().out
    assert main(["methods", "kdd"]) == 2
