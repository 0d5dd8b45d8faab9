"""What can be done with a run folder afterwards: export it again, measure it again."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from visiondistill import measure, recipes, workbench, workshop
from visiondistill.cli import main
from visiondistill.data import EmbeddedDigits
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.state import fingerprint
from visiondistill.eval import weights_hash
from visiondistill.export import onnx_file, open_export
from visiondistill.models import Network, SmallConvNet, WeightsSource, create

pytestmark = pytest.mark.usefixtures("undrawn_reports")

DISTILLER, CONV = "visiondistill.Distiller", "visiondistill.models.SmallConvNet"
CE = {"ce": {"class_path": "visiondistill.terms.CE"}}
KD = CE | {"kd": {"class_path": "visiondistill.terms.KL", "init_args": {"temperature": 2.0}}}
RUN = {"batch_size": 32, "device": "cpu", "progress": False, "log_every": 8, "checkpoint_every": 4, "keep": 9}
DIGITS = {"class_path": "visiondistill.data.EmbeddedDigits"}


def stage(widths: list[int], terms: dict, steps: int) -> dict:
    student = {"class_path": CONV, "init_args": {"widths": widths, "norm": "batch"}}
    return {
        "steps": steps,
        "method": {"class_path": DISTILLER, "init_args": {"student": student, "terms": terms}},
        "optim": {"student": {"lr": 1e-2}},
    }


def trained(folder: Path, config: dict, **settings) -> workbench.Outcome:
    return workbench.run(config | {"run": RUN | {"output_dir": str(folder)} | settings})


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> workbench.Outcome:
    """A timm model with an average, exported as a timm folder."""
    timm = {"class_path": "visiondistill.models.Timm", "init_args": {"name": "test_resnet"}}
    config = {"data": DIGITS, "student": timm, "method": {"class_path": DISTILLER, "init_args": {"terms": CE}}}
    config |= {"steps": 8, "optim": {"student": {"lr": 1e-2}}}
    return trained(tmp_path_factory.mktemp("single") / "run", config, ema_decay=0.5)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> workbench.Outcome:
    """A teacher, then its student, without an average, exported as a program."""
    config = {"data": DIGITS, "stages": {"teacher": stage([8], CE, 8), "student": stage([4], KD, 8)}}
    return trained(tmp_path_factory.mktemp("staged") / "run", config)


def bare(outcome: workbench.Outcome, folder: Path, *checkpoints: str) -> Path:
    """A run folder as a kill leaves it: the recipe and checkpoints, by default all of them."""
    folder.mkdir()
    shutil.copy(outcome.folder / "config.yaml", folder)
    for path in (outcome.folder / "checkpoints").iterdir():
        if not checkpoints or path.name in checkpoints:
            shutil.copytree(path, folder / "checkpoints" / path.name)
    return folder


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What a refused command says."""
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_an_export_from_the_checkpoint_is_the_runs_own(single, tmp_path):
    assert main(["export", "--run", str(single.folder), "--output_dir", str(tmp_path / "again")]) == 0
    names = {path.name for path in single.exported.folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (single.exported.folder / name).read_bytes()
    assert facts_of(tmp_path / "again")["weights"]["which"] == "EMA"


def test_raw_and_averaged_weights_are_those_of_the_run(single, tmp_path, capsys):
    for which, network in (("raw", single.result.product), ("ema", single.result.ema)):
        words = ["export", "--run", str(single.folder), "--weights", which, "--output_dir", str(tmp_path / which)]
        assert main(words) == 0
        assert facts_of(tmp_path / which)["weights"]["sha256"] == weights_hash(network)
        assert f"{'raw' if which == 'raw' else 'EMA'} weights" in capsys.readouterr().out
    assert weights_hash(single.result.product) != weights_hash(single.result.ema)
    stored = load_file(single.folder / "checkpoints" / "step_000000008" / "weights.safetensors")
    prefix = "players.student.model."
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    assert facts_of(tmp_path / "raw")["weights"]["sha256"] == fingerprint(own)


def test_figures_of_other_weights_are_not_taken_over(single, tmp_path):
    main(["export", "--run", str(single.folder), "--weights", "raw", "--output_dir", str(tmp_path / "raw")])
    metrics = facts_of(tmp_path / "raw")["about"]["metrics"]
    assert metrics["weights"] == {"which": "raw", "sha256": weights_hash(single.result.product)}
    assert metrics["n"] == 500


def test_a_killed_run_is_exported_from_its_newest_whole_checkpoint(single, tmp_path):
    run = bare(single, tmp_path / "run")
    damaged = run / "checkpoints" / "step_000000008" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = sorted(path for path in run.rglob("*"))
    with pytest.warns(UserWarning, match="falling back"):
        assert main(["export", "--run", str(run)]) == 0
    assert sorted(path for path in run.rglob("*") if run / "export" not in (path, path.parent)) == before
    facts = facts_of(run / "export")
    assert facts["about"]["method"]["checkpoint"] == "after step 4 of 8, in stage 'main'"
    assert facts["about"]["metrics"]["weights"]["sha256"] == facts["weights"]["sha256"]
    averages = load_file(run / "checkpoints" / "step_000000004" / "averages.safetensors")
    network, _ = open_export(run / "export")
    exported = network.model.state_dict()
    assert all(torch.equal(exported[name.removeprefix("model.")], tensor) for name, tensor in averages.items())


def test_of_several_stages_the_last_ones_product_is_exported(staged, tmp_path):
    run = bare(staged, tmp_path / "run")
    assert main(["export", "--run", str(run)]) == 0
    facts = facts_of(run / "export")
    assert facts["format"] == staged.exported.format == "program"
    assert facts["weights"]["sha256"] == staged.exported.weights_sha256 == weights_hash(staged.result.product)
    assert "checkpoint" not in facts["about"]["method"]


def test_a_run_that_ended_in_an_earlier_stage_has_no_product_yet(staged, tmp_path, capsys):
    run = bare(staged, tmp_path / "run", "step_000000004", "step_000000008", "stage_0_teacher")
    told = said(capsys, "export", "--run", str(run))
    assert "ended in stage 'teacher'" in told
    assert "--run.resume auto" in told
    assert not (run / "export").exists()
    words = ["--run", str(run), "--checkpoint", str(run / "checkpoints" / "stage_0_teacher")]
    assert main(["export", *words]) == 0
    teacher = staged.result.method.frozen["teacher"]
    assert facts_of(run / "export")["weights"]["sha256"] == weights_hash(teacher)


def test_what_no_checkpoint_holds_is_rebuilt_and_must_be_the_same(tmp_path, capsys):
    """Of a frozen trunk the checkpoint has nothing: it comes from the file that the recipe names."""
    import timm

    torch.manual_seed(0)
    file = tmp_path / "trunk.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=5, in_chans=1).state_dict(), file)
    arguments = {"name": "test_resnet", "weights": str(file), "new_head": True, "trainable": "head"}
    student = {"class_path": "visiondistill.models.Timm", "init_args": arguments | {"input_size": [1, 16, 16]}}
    config = {"data": DIGITS, "student": student, "optim": {"student": {"lr": 1e-2}}, "steps": 4}
    config |= {"method": {"class_path": DISTILLER, "init_args": {"terms": CE}}}
    outcome = trained(tmp_path / "run", config, proof_window=1)
    words = ["export", "--run", str(outcome.folder), "--output_dir", str(tmp_path / "again")]
    assert main(words) == 0
    assert facts_of(tmp_path / "again")["weights"]["sha256"] == outcome.exported.weights_sha256
    save_file(timm.create_model("test_resnet", num_classes=5, in_chans=1).state_dict(), file)
    assert "hold other weights" in said(capsys, *words)


def taught() -> SmallConvNet:
    """A teacher that is clear of chance."""
    torch.manual_seed(0)
    network, rows = SmallConvNet([8], "batch"), EmbeddedDigits().train().rows(torch.arange(500))
    optimizer = torch.optim.Adam(network.parameters(), 3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(rows["image"]), rows["label"]).backward()
        optimizer.step()
    return network


def test_a_teacher_may_lie_elsewhere_by_now_but_not_be_another(tmp_path, capsys):
    old, new, other = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "other"))
    save_file(taught().state_dict(), old)
    save_file(SmallConvNet([8], "batch").state_dict(), other)
    own = {"class_path": CONV, "init_args": {"widths": [8], "norm": "batch"}, "weights": str(old)}
    config = {"data": DIGITS, "teacher": {"class_path": "visiondistill.models.ClassPath", "init_args": own}}
    config |= {"student": {"class_path": CONV, "init_args": {"widths": [4]}}} | stage([4], KD, 4)
    del config["method"]["init_args"]["student"]
    outcome = trained(tmp_path / "run", config, proof_window=1)
    old.rename(new)
    words = ["export", "--run", str(outcome.folder), "--output_dir", str(tmp_path / "again")]
    assert "old.safetensors" in said(capsys, *words)
    assert "frozen networks" in said(capsys, *words, "--teacher.weights", str(other))
    assert main([*words, "--teacher.weights", str(new)]) == 0
    assert facts_of(tmp_path / "again")["weights"]["sha256"] == outcome.exported.weights_sha256
    assert facts_of(tmp_path / "again")["about"]["teacher"] == facts_of(outcome.exported.folder)["about"]["teacher"]


def test_a_checkpoint_of_other_settings_is_refused(staged, tmp_path, capsys):
    run = bare(staged, tmp_path / "run")
    config = recipes.load(run / "config.yaml")
    changed = recipes.override(config, {"stages.student.method.terms.kd.temperature": 3.0})
    (run / "config.yaml").write_text(recipes.dump(changed))
    assert "temperature: was 2.0, is 3.0" in said(capsys, "export", "--run", str(run))
    other = recipes.override(config, {"stages.student.method.student.widths": [5]})
    (run / "config.yaml").write_text(recipes.dump(other))
    assert "shapes" in said(capsys, "export", "--run", str(run))
    assert not (run / "export").exists()


def test_wrong_exports_are_refused_by_name(single, staged, tmp_path, capsys, monkeypatch):
    run = str(staged.folder)
    assert "--run FOLDER" in said(capsys, "export")
    assert "nowhere" in said(capsys, "export", "--run", "nowhere")
    assert "--weight (did you mean 'weights'?)" in said(capsys, "export", "--run", run, "--weight", "raw")
    assert "average" in said(capsys, "export", "--run", run, "--weights", "averaged")
    assert "ema_decay" in said(capsys, "export", "--run", run, "--weights", "ema")
    assert "nothing" in said(capsys, "export", "--run", run, "--checkpoint", str(tmp_path / "nothing"))
    assert "--onnx" in said(capsys, "export", "--run", run, "--onnx", "maybe")
    assert "data.rot" in said(capsys, "export", "--run", run, "--data.rot", "photos")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not an earlier export" in said(capsys, "export", "--run", run, "--output_dir", str(tmp_path / "mine"))
    monkeypatch.setattr(onnx_file, "NEEDED", ("no_such_package",))
    assert "visiondistill[export]" in said(capsys, "export", "--run", run, "--onnx", "true")


def test_what_was_given_as_an_object_cannot_be_built_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workshop.Classifiers, "finish", lambda *_: ({}, None))  # neither measured nor exported
    settings = {"run__output_dir": str(tmp_path / "run"), "run__progress": False, "run__device": "cpu", "steps": 4}
    workbench.distill(SmallConvNet([4]), None, EmbeddedDigits(), recipe="finetune", run__proof_window=1, **settings)
    told = said(capsys, "export", "--run", str(tmp_path / "run"))
    assert "names no student, teacher, data" in told
    assert "distill()" in told


def test_a_recipe_without_data_at_its_top_names_no_classes(tmp_path, capsys):
    short = ["--stages.teacher.steps", "2", "--stages.student.steps", "2", "--run.proof_window", "1"]
    words = ["train", "--recipe", "smoke/kd", "--run.output_dir", str(tmp_path / "run"), "--run.progress", "false"]
    assert main([*words, *short]) == 0
    assert "names no data at its top" in said(capsys, "export", "--run", str(tmp_path / "run"))


@pytest.mark.skipif(
    any(find_spec(name) is None for name in onnx_file.NEEDED), reason="the extra 'export' is not installed"
)
def test_onnx_is_written_and_measured_where_its_packages_are(staged, tmp_path):
    words = ["--run", str(staged.folder), "--onnx", "true", "--output_dir", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    costs = str(tmp_path / "cost")
    assert main(["evaluate", "cost", *words[:4], "--output_dir", costs, "--seconds", "0.02", "--batch_size", "8"]) == 0
    assert {"onnx float32", "onnx int8"} < set(json.loads((tmp_path / "cost" / "cost.json").read_text())["costs"])


def test_a_run_and_its_export_have_one_accuracy(staged, tmp_path):
    """The export of this run is a program; that of `single` a timm folder, see below."""
    assert main(["evaluate", "accuracy", "--run", str(staged.folder), "--output_dir", str(tmp_path / "run")]) == 0
    model = ["--model", str(staged.exported.folder), "--data.class_path", DIGITS["class_path"]]
    assert main(["evaluate", "accuracy", *model, "--output_dir", str(tmp_path / "model")]) == 0
    for folder in ("run", "model"):
        report = json.loads((tmp_path / folder / "accuracy.json").read_text())
        assert (report["accuracy"], report["n"]) == (staged.metrics["accuracy"], 500)
        assert report["weights"] == {"which": "raw", "sha256": staged.exported.weights_sha256}


def test_a_timm_folder_is_measured_with_and_without_our_facts(single, tmp_path):
    data = ["--data.class_path", DIGITS["class_path"], "--output_dir", str(tmp_path / "report")]
    folder = tmp_path / "plain"
    shutil.copytree(single.exported.folder, folder)
    for extra, which in (((), "EMA"), (("export.json",), "pretrained")):
        for name in extra:
            (folder / name).unlink()
        assert main(["evaluate", "accuracy", "--model", str(folder), *data]) == 0
        report = json.loads((tmp_path / "report" / "accuracy.json").read_text())
        assert report["accuracy"] == single.metrics["accuracy"]
        assert report["weights"]["which"] == which


def test_costs_need_no_data(single, staged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EmbeddedDigits, "__init__", lambda *_, **__: pytest.fail("data were read"))
    quick = ["--seconds", "0.02", "--batch_size", "4", "--output_dir", str(tmp_path)]
    for words in (["--run", str(staged.folder)], ["--model", str(single.exported.folder)]):
        assert main(["evaluate", "cost", *words, *quick]) == 0
        (cost,) = json.loads((tmp_path / "cost.json").read_text())["costs"].values()
        assert cost["throughput"]["batch"] == 4
    assert "latency" in capsys.readouterr().out


def test_a_timm_name_is_judged_with_its_published_weights_and_timed_without(tmp_path, monkeypatch, capsys):
    asked = []

    def published(name: str, options: dict) -> tuple[torch.nn.Module, WeightsSource]:
        asked.append(name)
        return create._made(name, options | {"num_classes": 10}), WeightsSource("pretrained", name)

    monkeypatch.setattr(create, "_pretrained", published)
    words = ["--model", "test_resnet", "--output_dir", str(tmp_path)]
    assert main(["evaluate", "cost", *words, "--seconds", "0.02", "--batch_size", "2"]) == 0
    assert asked == []

    def judged(network: Network, *_: object) -> None:
        raise SettingsError(f"judged: {network.source}")

    monkeypatch.setattr(measure, "report_on", judged)
    told = said(capsys, "evaluate", "accuracy", *words, "--data.class_path", DIGITS["class_path"])
    assert "judged: pretrained; test_resnet" in told
    assert asked == ["test_resnet"]


def test_wrong_evaluations_are_refused_by_name(single, staged, tmp_path, capsys, monkeypatch):
    run = str(staged.folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "'acuracy' (did you mean 'accuracy'?)" in said(capsys, "evaluate", "acuracy", "--run", run)
    assert "accuracy|cost" in said(capsys, "evaluate", "--run", run)
    for topic in ("accuracy", "cost"):
        assert "--run FOLDER" in said(capsys, "evaluate", topic)
        assert "--run FOLDER" in said(capsys, "evaluate", topic, "--run", run, "--model", "resnet18")
        assert "option --rum (did you mean 'run'?)" in said(capsys, "evaluate", topic, "--rum", run)
        assert "--run.seed" in said(capsys, "evaluate", topic, "--run", run, "--run.seed", "1")
        assert "resnet1888" in said(capsys, "evaluate", topic, "--model", "resnet1888", "--data.root", "x")
        assert "nowhere" in said(capsys, "evaluate", topic, "--run", "nowhere")
        assert "teacher.name" in said(capsys, "evaluate", topic, "--model", "resnet18", "--teacher.name", "x")
    assert "--batch_size" in said(capsys, "evaluate", "accuracy", "--run", run, "--batch_size", "4")
    assert "seconds" in said(capsys, "evaluate", "cost", "--run", run, "--seconds", "0")
    assert "data.rot" in said(capsys, "evaluate", "accuracy", "--run", run, "--data.rot", "x")
    model = ["evaluate", "accuracy", "--model", str(single.exported.folder)]
    assert "--data.root" in said(capsys, *model)
    unexported = bare(staged, tmp_path / "run")
    assert "visiondistill export --run" in said(capsys, "evaluate", "cost", "--run", str(unexported))
    monkeypatch.setattr(onnx_file, "NEEDED", ("no_such_package",))
    assert "visiondistill[export]" in said(capsys, "evaluate", "cost", "--run", run, "--onnx", "true")


def test_data_of_other_classes_are_refused(staged, tmp_path, capsys, monkeypatch):
    class Renamed(EmbeddedDigits):
        def __init__(self) -> None:
            super().__init__()
            self.classes = tuple(reversed(self.classes))

    class Fewer(EmbeddedDigits):
        def __init__(self) -> None:
            super().__init__()
            self.classes = self.classes[:3]

    monkeypatch.setattr(sys.modules[__name__], "Renamed", Renamed, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "Fewer", Fewer, raising=False)
    words = ["evaluate", "accuracy", "--model", str(staged.exported.folder), "--data.class_path"]
    assert "class 0 is '9', but '0' in the export" in said(capsys, *words, f"{__name__}.Renamed")
    assert "3 classes, but the network tells 10 apart" in said(capsys, *words, f"{__name__}.Fewer")
