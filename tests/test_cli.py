"""The console command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from visiondistill import catalogue, recipes, schema
from visiondistill.cli import COMMANDS, main
from visiondistill.engine import Batch
from visiondistill.engine.step import Step

ROOT = Path(__file__).resolve().parent.parent
RING = entry_points(group=COMMANDS, name="demo.ring")
SHORT = ["--run.log_every", "5", "--run.progress", "false", "--run.proof_window", "2"]
SHORT += ["--stages.teacher.steps", "6", "--stages.student.steps", "6"]


def test_train_runs_a_recipe_and_resumes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["train", "--recipe", "smoke/kd", "--run.output_dir", str(tmp_path / "run"), *SHORT]
    assert main(words) == 0
    assert "finished after step 12" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.yaml").is_file()
    for again in (words, [*words, "--dry-run"]):
        assert main(again) == 2
        told = capsys.readouterr()
        assert "already holds a run" in told.err
        assert not told.out, "it is said before the preflight"
    again = ["train", "--recipe", str(tmp_path / "run" / "config.yaml"), "--run.resume", "auto"]
    assert main(again) == 0


def test_an_interrupted_run_says_what_is_kept_and_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, play = tmp_path / "run", Step.__call__

    def interrupted(self: Step, step: int, raw: Sequence[Batch]) -> None:
        play(self, step, raw)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    words = ["train", "--recipe", "smoke/kd", "--run.output_dir", str(folder), *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        assert main(words) == 128 + signal.SIGINT
    *_, where, further = capsys.readouterr().out.splitlines()
    (saved,) = (folder / "checkpoints").iterdir()
    assert where == f"SIGINT after step 3; run folder {folder}"
    assert further == f"kept as {saved}; the same command with --run.resume auto goes on from there"
    assert main([*words, "--run.resume", "auto"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"finished after step 12; run folder {folder}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], "trian"),
        (["train"], "--recipe"),
        (["train", "--recipe", "nothing"], "nothing"),
        (["train", "--recipe", "smoke/kd", "--run.sede", "1"], "sede"),
        (["demo", "--seed", "1"], "--seed"),
        (["demo", "--seeds", "many"], "--seeds"),
        (["demo", "--seeds"], "--seeds"),
        (["demo", "rings"], "'rings' (did you mean 'ring'?)" if RING else "rings"),
        (["benchmark", "step", "--pair", "3"], "--pair (did you mean 'pairs'?)"),
        (["benchmark"], "benchmark step"),
        (["benchmark", "performance", "--sise", "3"], "--sise (did you mean 'size'?)"),
        (["benchmark", "stp"], "'stp' (did you mean 'step'?)"),
        (["finetune", "--recipe", "kd"], "--recipe"),
        (["train", "--recipe", "7"], "'7'"),
        (["exprt"], "'exprt' (did you mean 'export'?)"),
    ],
)
def test_wrong_input_exits_with_2_and_names_it(words: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert named in capsys.readouterr().err


VERBS = ("demo", "train", "finetune", "evaluate", "store", "export", "compare", "methods", "benchmark")
LIGHT = """
import contextlib, io, sys
from visiondistill.cli import main
for words in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(words) == 0, words
    assert "usage: visiondistill" in told.getvalue() or words == ["methods"], words
    heavy = {{"torch", "timm", "numpy", "jsonargparse", "rich", "diffusion.toys"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: visiondistill {verb}" in capsys.readouterr().out


def test_every_verb_is_in_the_usage(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {verb} " in told for verb in VERBS)
    assert main([]) == 2
    assert main(["nothing"]) == 2
    assert set(capsys.readouterr().err.strip().partition("there are ")[2].split(", ")) == set(VERBS)


def test_help_and_the_list_of_methods_import_nothing_heavy() -> None:
    commands = [["--help"], ["methods"], *([verb, "--help"] for verb in VERBS)]
    commands += [["evaluate", "accuracy", "--help"], *([["demo", "ring", "--help"]] if RING else [])]
    script = LIGHT.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_list_of_methods_has_titles_and_papers_from_the_recipes(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (dkd,) = (line for line in lines if line.startswith("dkd "))
    cells = ["dkd", "Decoupled knowledge distillation", "Zhao et al. 2022", "configs/dkd.yaml"]
    assert [cell for cell in re.split(r"\s{2,}", dkd) if cell] == cells
    named = [line.split()[0] for line in lines if line and not line.endswith(":")]
    assert sorted(named) == recipes.names()
    first = next(number for number, line in enumerate(lines) if not line)
    assert all("/" not in name for name in named[:first])
    assert all("/" in name for name in named[first:])
    for entry in catalogue.entries():
        top = (recipes.folder().parent / entry.file).read_text().splitlines()[0]
        assert entry.paper in top
        assert top.startswith(f"# {entry.title[:40]}")


def test_a_method_is_told_with_its_classes_and_its_settings(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods", "dkd"]) == 0
    told = capsys.readouterr().out
    lines = (ROOT / "visiondistill" / "terms" / "dkd.py").read_text().splitlines()
    place = lines.index("class DKD(Term):") + 1
    assert f"visiondistill.terms.DKD  (visiondistill/terms/dkd.py:{place})\n    The teacher's target-class" in told
    assert "visiondistill.Distiller  (visiondistill/distiller.py:" in told
    assert "visiondistill.weighting.Fixed  (" in told
    settings = told[told.index("\ndata:\n") :]
    assert yaml.safe_load(settings) == recipes.load("dkd")
    assert main(["methods", "smoke/kd"]) == 0
    head, _, settings = capsys.readouterr().out.partition("\nstages:\n")
    assert head.count("visiondistill.terms.CE  (") == 1, "once, however many stages name it"
    assert "SmallConvNet" in settings
    assert "SmallConvNet" not in head, "networks are not what a method is about"
    assert main(["methods", "dkdd"]) == 2
    assert "did you mean 'dkd'" in capsys.readouterr().err
    assert main(["methods", "kd", "dkd"]) == 2
    assert "'dkd' is too much" in capsys.readouterr().err


PLUGIN = """
from visiondistill.options import options_of

def evaluate_ssim(words):
    'usage: visiondistill evaluate ssim --samples DIR'
    options = options_of(words, evaluate_ssim, {"samples": None})
    if options is not None:
        print("ssim of", options["samples"])
    return 0
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that extends `evaluate`, and one that is broken."""
    (tmp_path / "ssim_plugin.py").write_text(PLUGIN)
    info = tmp_path / "ssim_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ssim-plugin\nVersion: 1.0\n")
    points = ["evaluate.ssim = ssim_plugin:evaluate_ssim", "evaluate.psnr = ssim_plugin:evaluate_psnr"]
    (info / "entry_points.txt").write_text("\n".join(["[visiondistill.commands]", *points]))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("ssim_plugin", None)


def test_another_package_extends_evaluate(plugin: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "ssim", "--samples", "7"]) == 0
    assert capsys.readouterr().out == "ssim of 7\n"
    assert main(["evaluate", "ssim", "--help"]) == 0
    assert "evaluate ssim --samples" in capsys.readouterr().out
    for words, named in ((["ssim", "--sample", "x"], "--sample"), (["ssi"], "'ssim'"), (["psnr"], "evaluate_psnr")):
        assert main(["evaluate", *words]) == 2
        assert named in capsys.readouterr().err
    assert main(["evaluate", "nothing"]) == 2
    told = capsys.readouterr().err
    assert "there are accuracy, cost, " in told
    assert "psnr, ssim" in told


OTHERS = {
    "package": {"diffusion/__init__.py": ""},
    "module": {"diffusion.py": "def sample(): ..."},
    "broken": {"diffusion/__init__.py": "1 / 0"},
    "like ours": {"diffusion/__init__.py": "", "diffusion/cli.py": "demo = None"},
}


@pytest.mark.skipif(not RING, reason="visiondistill is not installed, so that `demo ring` is not registered")
@pytest.mark.parametrize("kind", OTHERS)
def test_another_diffusion_package_is_named_with_the_cure(tmp_path: Path, kind: str) -> None:
    for file, text in OTHERS[kind].items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    commands = [["demo", "ring", "--output_dir", "out"]]
    commands += [["train", "--recipe", "smoke/dmd2", "--run.output_dir", "out"]] if kind == "package" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    for words in commands:
        command = [sys.executable, "-m", "visiondistill", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert f"'diffusion' is {tmp_path / next(iter(OTHERS[kind]))} here, another package" in done.stderr
        assert f"the one that comes with visiondistill ({ROOT / 'diffusion'})" in done.stderr
        assert "PYTHONPATH" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_package_that_overwrote_ours_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "other_diffusion-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-diffusion\nVersion: 2.0\n")
    (info / "top_level.txt").write_text("diffusion\n")
    assert "other-diffusion" not in schema.shadowed("diffusion.toys")
    monkeypatch.syspath_prepend(tmp_path)
    assert "other-diffusion installed a package 'diffusion'" in schema.shadowed("diffusion.toys")
    with pytest.raises(schema.RecipeError, match="uninstall it, then install visiondistill again"):
        schema.import_object("diffusion.toys.Rong", "method")
    # Neighbours in an installation are not ours for lying there.
    monkeypatch.setattr(schema, "__file__", str(Path(yaml.__file__).parents[1] / "visiondistill" / "schema.py"))
    for name in ("visiondistill.terms", "nowhere.at_all", "yaml.loader"):
        assert schema.shadowed(name) == ""


def test_module_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "visiondistill", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_accelerate_launches_two_processes(tmp_path: Path) -> None:
    command = [
        # --multi_gpu is how accelerate starts several processes without MPI; without a GPU they meet over gloo.
        *[sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        *["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
        *[
            str(ROOT / "scripts" / "train.py"),
            "--recipe",
            "smoke/kd",
            "--run.output_dir",
            str(tmp_path / "run"),
            *SHORT,
        ],
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    assert done.stdout.count("finished after step 12") == 1
