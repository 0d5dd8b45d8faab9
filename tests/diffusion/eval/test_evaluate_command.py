"""`visiondistill evaluate fd|fid|kid|pr`, as a user types it."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusion import cli
from diffusion.generator import Generator
from visiondistill.export import export
from visiondistill.models import Timm
from visiondistill.schema import RecipeError

DIGITS = ["--data.class_path", "visiondistill.data.EmbeddedDigits"]
DATA = "data: {class_path: visiondistill.data.EmbeddedDigits}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_generator: Callable[..., Generator]) -> Path:
    """A run folder; its generator is opened by a stand-in."""
    folder = tmp_path / "runs" / "one"
    (folder / "export").mkdir(parents=True)
    (folder / "config.yaml").write_text(DATA)

    def open_generator(path: Path, contrast: float = 0.1) -> Generator:
        if path.name == "empty":
            raise ValueError(f"{path} holds no pipeline")
        assert path.name in ("export", "pipeline"), "a run is measured by its export"
        return make_generator(contrast)

    monkeypatch.setitem(sys.modules, "diffusion.models", SimpleNamespace(open_generator=open_generator))
    return folder


def test_a_run_is_measured_on_its_data(run: Path, capsys: pytest.CaptureFixture):
    words = ["--run", str(run), "--extractor", "random", "--count", "40", "--batch_size", "16", "--seed", "2"]
    assert cli.evaluate_fd(words) == 0
    shown = capsys.readouterr().out
    assert "fd_random" in shown
    assert "diversity_random" in shown
    read = json.loads((run / "evaluation" / "fd_random.json").read_text())
    assert (read["count"], read["seed"], read["steps"]) == (40, 2, 1)
    assert read["reference"]["split"] == "test"
    assert read["reference"]["images"] == 500
    assert len(list((run.parent / "reference_features").iterdir())) == 1, "beside the run"


def test_the_generator_is_opened_as_asked_for(run: Path):
    words = ["--run", str(run), "--extractor", "random", "--count", "20"]
    read = []
    for options in ([], ["--generator.contrast", "0.0"]):
        assert cli.evaluate_fd([*words, *options]) == 0
        read.append(json.loads((run / "evaluation" / "fd_random.json").read_text()))
    assert read[1]["samples"]["diversity_within_classes_random"] == pytest.approx(0, abs=1e-3)
    assert read[0]["samples"]["diversity_within_classes_random"] > 0.1


@pytest.mark.parametrize(("topic", "named"), [("kid", "kid_random_spread"), ("pr", "precision_random")])
def test_each_topic_measures_its_own(run: Path, tmp_path: Path, topic: str, named: str):
    words = ["--run", str(run), "--extractor", "random", "--count", "20", "--split", "val", "--steps", "3"]
    folders = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    assert getattr(cli, f"evaluate_{topic}")([*words, *folders]) == 0
    read = json.loads((tmp_path / "out" / f"{topic}_random.json").read_text())
    assert named in read["samples"]
    assert not any(name.startswith(("fd", "fid", "diversity")) for name in read["samples"])
    assert read["reference"]["images"] == 200
    assert read["steps"] == 3
    assert (tmp_path / "cache").is_dir()


def test_a_pipeline_needs_data(run: Path, tmp_path: Path):
    words = ["--pipeline", str(tmp_path / "pipeline"), "--extractor", "random", "--count", "20"]
    with pytest.raises(RecipeError, match=r"data.root"):
        cli.evaluate_fd(words)
    assert cli.evaluate_fd([*words, *DIGITS]) == 0
    assert (tmp_path / "pipeline" / "evaluation" / "fd_random.json").is_file()


@pytest.mark.parametrize(
    ("topic", "words", "named"),
    [
        ("fd", [], "--run FOLDER, or --pipeline"),
        ("fd", ["--run", "RUN", "--pipeline", "there"], "--run FOLDER, or --pipeline"),
        ("fd", ["--pipeline", "empty", "--extractor", "random", *DIGITS], "empty holds no pipeline"),
        ("fd", ["--run", "RUN", "--extractor", "random", "--generator.contrasts", "1"], "contrasts"),
        ("fd", ["--run", "RUN", "--extractor", "inception"], "evaluate fid"),
        ("fd", ["--run", "RUN", "--extractor", "rendom"], "choose squeezenet"),
        ("fd", ["--run", "RUN", "--extractor_weights", "nowhere.pth"], "nowhere.pth"),
        ("fid", ["--run", "RUN"], "weights-inception-2015-12-05-6726825d.pth"),
        ("fid", ["--run", "RUN", "--extractor_weights", "nowhere.pth"], "no file nowhere.pth"),
        ("fid", ["--run", "RUN", "--extractor", "random"], "evaluate fd"),
        ("kid", ["--run", "RUN", "--extractor", "random", "--metrics", "fd"], "--metrics"),
        ("pr", ["--run", "nowhere", "--extractor", "random"], "not a run folder"),
        ("pr", ["--run", "RUN", "--extractor", "random", "--split", "tset"], "no tset split"),
        ("pr", ["--run", "RUN", "--extractor", "random", "--count", "2"], "at least 4"),
        ("pr", ["--run", "RUN", "--extractor", "random", "--classifier", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_refused(run: Path, topic: str, words: list[str], named: str):
    words = [str(run) if word == "RUN" else word for word in words]
    with pytest.raises(ValueError, match=named) as refused:
        getattr(cli, f"evaluate_{topic}")(words)
    assert refused.value.exit_code == 2


def test_a_classifier_of_other_classes_is_refused(run: Path, tmp_path: Path):
    words = ["--run", str(run), "--extractor", "random", "--count", "20", "--classifier", str(tmp_path / "judge")]
    network = Timm("resnet18", num_classes=4, input_size=(1, 16, 16))
    export(network, tmp_path / "judge", classes="3210")
    with pytest.raises(ValueError, match="names or their order differ"):
        cli.evaluate_fd(words)


def test_help_is_light_and_whole(capsys: pytest.CaptureFixture):
    assert cli.evaluate_kid(["--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--extractor_weights", "--count", "--cache_dir", "--data.root", "fid"):
        assert option in shown


def test_every_topic_is_an_entry_point():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    commands = project["entry-points"]["visiondistill.commands"]
    for topic in ("fd", "fid", "kid", "pr"):
        module, _, name = commands[f"evaluate.{topic}"].partition(":")
        assert getattr(import_module(module), name) is getattr(cli, f"evaluate_{topic}")
