"""What the README says to type, typed: every command in one folder, one after the other, as its reader does."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from visiondistill import cli, demo, recipes, workbench
from visiondistill.data import ImageFolder
from visiondistill.eval import evaluate
from visiondistill.export.reopen import open_export

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
RATE = ["--optim.student.lr", "0.01"]
TINY = "test_resnet"
"""A timm model of 0.4 M parameters with published weights, in place of the README's large pretrained one."""

CLASSES = ["blood", "grass", "sky"]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every command in the sh blocks, without comments, in order."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def spans(start: str) -> list[str]:
    """Code within the text that begins so."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose) if span.startswith(start)]


def is_ours(words: list[str]) -> bool:
    return Path(words[0]).name == "visiondistill"


OURS = [words[1:] for words in commands() if is_ours(words)]
OF_GENERATORS = ("denoising", "dmd2")
TRAININGS = [words for words in OURS if words[0] == "train" and words[2] not in OF_GENERATORS]
GENERATORS = [words for words in OURS if words[0] == "train" and words[2] in OF_GENERATORS]
KINDS = [words for words in commands() if not is_ours(words)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `photos` as the README describes them, no network, and "published" weights in the hub's cache."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("reader")
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for channel, name in enumerate(CLASSES):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (24, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{index}.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.chdir(folder)
        publish(folder / "hub")
        yield folder


def publish(hub: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(TINY)
    repository = hub / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(model.state_dict(), snapshot / "model.safetensors")


def short(words: list[str]) -> list[str]:
    """What makes a command of the README one of seconds, appended to it."""
    more = ["--run.batch_size", "12", "--run.device", "cpu", "--run.log_every", "5", "--run.proof_window", "3"]
    if "finetune" in words:
        return [*more, "--student.name", TINY, "--student.input_size", "[3, 64, 64]", "--steps", "60", *RATE]
    return [*more, "--steps", "4", "--optim.student.warmup", "1"]


def test_the_readme_has_what_these_tests_look_for():
    assert [words[words.index("--recipe") + 1] for words in GENERATORS] == list(OF_GENERATORS)
    assert len(TRAININGS) == 2
    assert [words[words.index("--recipe") + 1] for words in TRAININGS] == ["finetune", "kd"]
    assert len(blocks("python")) == 1
    assert ["demo"] in OURS
    assert len(OURS) + len(KINDS) == len(commands())


def test_installing_names_what_there_is():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in KINDS:
        if words[-3:-1] == ["install", "-e"]:
            path, _, extra = words[-1].rstrip("]").partition("[")
            assert (ROOT / path / "pyproject.toml").is_file()
            assert not extra or extra in extras, words
        else:
            assert words[1:] in (["-m", "venv", ".venv"], ["-m", "pytest"]), words
    assert any(words[1:] == ["-m", "pytest"] for words in KINDS)
    assert any(requirement.startswith("pytest") for requirement in extras["test"])


def test_the_demo_runs(place: Path, monkeypatch: pytest.MonkeyPatch):
    """What it shows is tested beside it; here, that the words lead to it."""
    called = []
    monkeypatch.setattr(demo, "run_demo", lambda *given, **options: called.append((given, options)))
    assert cli.main(["demo"]) == 0
    assert called == [((Path("runs/demo"),), {"seeds": range(3)})]


@pytest.fixture(scope="module")
def trained(place: Path) -> list[Path]:
    """Run folders of the README's trainings, run as one chain."""
    for words in TRAININGS:
        assert cli.main([*words, *short(words), "--dry-run"]) == 0
        assert not (place / "runs" / words[words.index("--recipe") + 1]).exists()
        assert cli.main([*words, *short(words)]) == 0, words
    return [place / "runs" / words[words.index("--recipe") + 1] for words in TRAININGS]


def test_the_trainings_run_as_one_chain(trained: list[Path]):
    finetuned, distilled = trained
    for run in trained:
        found = {path.name for path in run.iterdir()}
        assert {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints", "evaluation", "export"} <= found
    teacher = recipes.load(distilled / "config.yaml")["teacher"]["init_args"]["name"]
    assert Path(teacher.removeprefix("local-dir:")).resolve() == finetuned / "export"


def test_the_chain_of_generators(place: Path, capsys: pytest.CaptureFixture):
    tiny = [
        "--student.block_out_channels",
        "[8, 16]",
        "--student.norm_num_groups",
        "4",
        "--student.layers_per_block",
        "1",
    ]
    for words in GENERATORS:
        more = [*short(words), "--data.size", "8", *(tiny if "denoising" in words else [])]
        assert cli.main([*words, *more]) == 0, words
    (measured,) = [words for words in OURS if words[0] == "evaluate"]
    assert cli.main([*measured, "--extractor", "random", "--count", "8"]) == 0
    assert "fd_random" in capsys.readouterr().out
    (line,) = spans("DiffusionPipeline.")
    from diffusers import DiffusionPipeline

    images = eval(line, {"DiffusionPipeline": DiffusionPipeline}).images
    assert images[0].size == (8, 8)


def test_the_export_opens_by_the_readmes_line(trained: list[Path]):
    (line,) = spans("timm.create_model(")
    network = eval(line, {"timm": timm})
    assert network.num_classes == 3
    assert network.pretrained_cfg["label_names"] == CLASSES


def test_an_export_scores_what_its_run_was_told(trained: list[Path]):
    """Of images that are smaller than what the fine-tuned network takes, too."""
    for run in trained:
        network, _ = open_export(run / "export")
        told = json.loads((run / "evaluation" / "accuracy.json").read_text())
        found = evaluate(network, ImageFolder("photos").test())
        assert (found.accuracy, found.count) == (told["accuracy"], told["n"])


def test_the_notebook_snippet_runs_after_them(trained: list[Path], monkeypatch: pytest.MonkeyPatch):
    options = {"steps": 4, "run__batch_size": 12, "run__device": "cpu", "run__proof_window": 3, "run__progress": False}
    monkeypatch.setattr(workbench, "distill", partial(workbench.distill, **options))
    *lines, last = blocks("python")[0].strip().splitlines()
    names: dict = {}
    exec("\n".join(lines), names)
    accuracy, folder = eval(last, names)
    assert 0 <= accuracy <= 1
    assert (folder / "export" / "config.json").is_file()
    assert folder.resolve() not in trained


def test_what_is_launched_on_several_devices_takes_the_same_words(trained: list[Path], monkeypatch: pytest.MonkeyPatch):
    (line,) = spans("accelerate launch")
    launcher, verb, script, *words = shlex.split(line.removesuffix(" ..."))
    assert (launcher, verb) == ("accelerate", "launch")
    assert line.endswith(" ..."), "what stands for the other words of the command above"
    rest = [word for word in TRAININGS[1][1:] if word not in words]
    options = ["--run.output_dir", "runs/launched", *short(TRAININGS[1])]
    monkeypatch.setattr(sys, "argv", [script, *words, *rest, *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    assert (trained[1].parent / "launched" / "export" / "config.json").is_file()


@pytest.mark.parametrize("span", spans("visiondistill "))
def test_verbs_that_the_text_names_exist(span: str, capsys: pytest.CaptureFixture):
    words = shlex.split(span)[1:]
    assert cli.main([*words, "--help"]) == 0
    assert "usage: visiondistill" in capsys.readouterr().out


def test_the_list_of_recipes_is_whole(capsys: pytest.CaptureFixture):
    assert "visiondistill methods" in spans("visiondistill ")
    assert cli.main(["methods"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert set(recipes.names()) <= listed


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
