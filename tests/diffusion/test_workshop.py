"""Around the training of generators, as a user runs it: grids, distances, exports, and what can be done afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion import workshop
from diffusion.generator import Generator
from diffusion.methods.dmd2 import DMD2
from diffusion.models import open_generator
from diffusion.workshop import Generators
from visiondistill import recipes, workbench
from visiondistill.cli import main
from visiondistill.data import OwnData, TensorData
from visiondistill.engine.checkpoints import restore, stage_name
from visiondistill.engine.errors import SettingsError
from visiondistill.schema import RecipeError

STEPS, LOOKS = 6, 3
SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4, "steps": 2}
UNET = {"class_path": "diffusion.models.UNet2D", "init_args": SMALL}
DENOISING = {"class_path": "diffusion.methods.Denoising"}
MATCHING = {"class_path": "diffusion.methods.DMD2", "init_args": {"student_every": 1}}
RUN = {"batch_size": 8, "device": "cpu", "progress": False, "log_every": 1, "proof_window": 2}
RUN |= {"evaluate_every": LOOKS, "checkpoint_every": LOOKS, "keep": 9, "ema_decay": 0.5}


def config(folder: Path, **changes: Any) -> recipes.Config:
    """Of one stage of denoising on digits."""
    whole = {"data": {"class_path": "visiondistill.data.EmbeddedDigits"}, "student": UNET}
    whole |= {"method": DENOISING, "steps": STEPS, "optim": {"default": {"lr": 1e-3}}}
    return recipes.override(whole | {"run": RUN | {"output_dir": str(folder)}}, changes)


def in_two_stages(folder: Path, **changes: Any) -> recipes.Config:
    """A teacher, and what is distilled from it."""
    stages = {
        name: {"steps": steps, "method": method, "optim": {"default": {"lr": 1e-3}}}
        for name, steps, method in (("teacher", 4, DENOISING), ("dmd2", STEPS, MATCHING))
    }
    whole = {key: value for key, value in config(folder).items() if key in ("data", "student", "run")}
    return recipes.override(whole | {"stages": stages}, changes)


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop, "MEASURED", 16)
        patch.setattr(workshop, "SHOWN", 8)
        yield


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> workbench.Outcome:
    return workbench.run(config(tmp_path_factory.mktemp("single") / "run"))


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> workbench.Outcome:
    return workbench.run(in_two_stages(tmp_path_factory.mktemp("staged") / "run"))


def again(outcome: workbench.Outcome, folder: Path) -> Path:
    """A copy of the run folder, without its export."""
    shutil.copytree(outcome.folder, folder, ignore=shutil.ignore_patterns("export"))
    return folder


def grids(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "samples").iterdir())}


def images(generator: Generator) -> torch.Tensor:
    return next(generator.images(4))[0]


# --- what the data decide


def test_a_student_has_the_datas_size_and_classes(single: workbench.Outcome):
    student = single.student
    assert (student.input_size, student.num_classes) == ((1, 8, 8), 10)
    assert torch.equal(next(student.images(4))[1], torch.arange(4))
    written = recipes.load(single.folder / "config.yaml")["student"]["init_args"]
    assert not {"input_size", "num_classes"} & set(written), "they stay the data's"


def test_no_classes_are_learned_where_the_recipe_says_so(tmp_path: Path):
    said = recipes.read_back(config(tmp_path, **{"student.num_classes": None}))
    plan = recipes.plan(said)
    assert plan.student.num_classes is None
    assert plan.student.input_size == (1, 8, 8)
    assert recipes.resolve(said)["student"]["init_args"]["num_classes"] is None
    (tmp_path / "free.yaml").write_text("base: denoising\nstudent: {init_args: {num_classes: null}}\n")
    assert recipes.load(tmp_path / "free.yaml")["student"]["init_args"]["num_classes"] is None
    other = config(tmp_path, **{"student.input_size": [1, 12, 12]})
    assert recipes.plan(other).student.input_size == (1, 12, 12)


def test_without_data_the_size_must_be_said(tmp_path: Path):
    bare = {key: value for key, value in config(tmp_path).items() if key != "data"}
    with pytest.raises(RecipeError, match=r"student: .*input_size"):
        recipes.plan(bare)


# --- during a run, and at its end


def test_a_run_leaves_grids_distances_a_picture_and_a_pipeline(single: workbench.Outcome):
    folder = single.folder
    assert list(grids(folder)) == ["step_000000003.png", "step_000000006.png"]
    assert len(set(grids(folder).values())) == 2, "it moved between the looks"
    assert (folder / "samples.png").is_file()
    measured = json.loads((folder / "evaluation" / "generation.json").read_text())
    assert measured == json.loads(json.dumps(single.metrics))
    assert (measured["count"], measured["reference"]["split"]) == (16, "test")
    assert single.exported.weights == "EMA"
    torch.testing.assert_close(images(open_generator(single.exported.folder, num_classes=10)), images(single.student))
    said = json.loads((folder / "preflight.json").read_text())["notes"]
    assert any(line.startswith("student: ") and "predicts v" in line for line in said)
    assert any(line.startswith("sampled with ddim, 2 steps at ") for line in said)


def test_a_resumed_run_shows_the_same_grids_under_the_same_names(single: workbench.Outcome, tmp_path: Path):
    folder = again(single, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step_000000006")
    (folder / "samples" / "step_000000006.png").unlink()
    (folder / "samples" / "step_000000003.png").write_bytes(b"kept")
    resumed = workbench.run(config(folder, **{"run.resume": "auto"}))
    assert resumed.result.reason == "finished"
    assert grids(folder) == grids(single.folder) | {"step_000000003.png": b"kept"}


def test_what_stops_a_look_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def look(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("here")

    monkeypatch.setattr("diffusion.eval.sample_grid", look)
    with pytest.raises(KeyboardInterrupt, match="here"):
        workbench.run(config(tmp_path / "run"))
    assert not (tmp_path / "run" / "export").exists()


# --- afterwards


def test_a_run_is_exported_again_from_its_checkpoint(single: workbench.Outcome, tmp_path: Path):
    folder = again(single, tmp_path / "run")
    made = {"ema": single.result.ema, "raw": single.result.product}
    for weights, generator in made.items():
        assert main(["export", "--run", str(folder), "--weights", weights]) == 0
        opened = open_generator(folder / "export", num_classes=10)
        torch.testing.assert_close(images(opened), images(generator))
    assert not torch.equal(images(made["ema"]), images(made["raw"]))
    assert main(["export", "--run", str(folder), "--output_dir", str(tmp_path / "other")]) == 0
    torch.testing.assert_close(images(open_generator(tmp_path / "other", num_classes=10)), images(made["ema"]))


def test_a_generator_is_no_onnx_file(single: workbench.Outcome, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = again(single, tmp_path / "run")
    assert main(["export", "--run", str(folder), "--onnx", "true"]) == 2
    assert "onnx: " in capsys.readouterr().err
    assert not (folder / "export").exists()


@pytest.mark.parametrize("words", [["evaluate", "accuracy"], ["evaluate", "cost"], ["store", "--file", "x"]])
def test_what_is_for_classifiers_names_what_is_for_generators(
    words: list[str], single: workbench.Outcome, capsys: pytest.CaptureFixture
):
    assert main([*words, "--run", str(single.folder)]) == 2
    told = capsys.readouterr().err
    assert f"measured by visiondistill evaluate fd|fid|kid|pr --run {single.folder}" in told


def test_a_run_is_measured_by_the_command_that_is_named(single: workbench.Outcome, tmp_path: Path):
    words = ["--run", str(single.folder), "--extractor", "random", "--count", "16", "--output_dir", str(tmp_path)]
    assert main(["evaluate", "fd", *words, "--cache_dir", str(tmp_path / "cache")]) == 0
    assert json.loads((tmp_path / "fd_random.json").read_text())["count"] == 16


# --- a teacher and its student in one run


def test_of_two_stages_the_last_ones_student_is_the_product(staged: workbench.Outcome):
    method, student = staged.result.method, staged.student
    assert isinstance(method, DMD2)
    assert (student.steps, student.sampler, student.num_classes) == (1, "student", 10)
    assert (method.teacher.steps, method.teacher.sampler) == (2, "ddim")
    own = {id(p) for p in method.players.parameters()}
    assert not own & {id(p) for p in method.teacher.parameters()}
    assert list(grids(staged.folder)) == [f"step_{step:09d}.png" for step in (3, 4, 7, 10)]
    assert json.loads((staged.folder / "evaluation" / "generation.json").read_text())["steps"] == 1
    assert staged.exported.steps == 1
    torch.testing.assert_close(images(open_generator(staged.exported.folder, num_classes=10)), images(student))


def test_the_teacher_stands_still_while_its_student_learns(staged: workbench.Outcome):
    plan = recipes.plan(recipes.load(staged.folder / "config.yaml"))
    end = staged.folder / "checkpoints" / stage_name(0, plan.stages[0])
    before = restore(plan.stages[:1], plan.run, end).method.handover()
    assert torch.equal(images(before), images(staged.result.method.teacher))
    assert not torch.equal(images(before), images(staged.result.product))


def test_a_run_of_two_stages_is_exported_again(staged: workbench.Outcome, tmp_path: Path):
    folder = again(staged, tmp_path / "run")
    assert main(["export", "--run", str(folder)]) == 0
    torch.testing.assert_close(images(open_generator(folder / "export", num_classes=10)), images(staged.student))


def test_a_later_stage_that_says_no_student_repeats_as_written(staged: workbench.Outcome):
    written = recipes.load(staged.folder / "config.yaml")
    assert "student" not in written["stages"]["dmd2"]["method"]["init_args"]
    recipes.check(written)


def test_the_top_of_a_recipe_gives_its_student_where_no_earlier_stage_trained_it(tmp_path: Path):
    own = {"student": {"class_path": "diffusion.models.UNet2D", "init_args": SMALL | {"input_size": [1, 8, 8]}}}
    plan = recipes.plan(in_two_stages(tmp_path, **{"stages.teacher.method": DENOISING | {"init_args": own}}))
    teacher = plan.stages[0].method.handover()
    second = plan.stages[1].method(teacher)
    assert second.product() is plan.student.denoiser
    assert second.teacher is teacher


# --- before the first step


def test_every_stage_says_when_its_student_is_sampled(staged: workbench.Outcome):
    notes = staged.facts.notes
    teacher, student = (staged.result.method.teacher.times(), staged.student.times())
    for name, sampler, times in (("teacher", "ddim, 2 steps", teacher), ("dmd2", "student, 1 step", student)):
        shown = ", ".join(str(t) for t in times.tolist())
        assert f"{name}: sampled with {sampler} at {shown} (the last is the clean end)" in notes
    assert "dmd2: the teacher's score is taken with no guidance" in notes
    assert not any(note.startswith("teacher: the teacher's score") for note in notes), "it has none"


def test_to_look_at_a_later_stage_leaves_the_first_ones_student_to_be_trained(tmp_path: Path):
    plan = recipes.plan(in_two_stages(tmp_path / "run"))
    student = plan.stages[0].method.product()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Generators().preflight(plan)
    assert torch.equal(torch.rand(1), expected), "and nobody's draws"
    assert all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_stage_that_only_a_trained_teacher_fits_says_so(tmp_path: Path):
    regression = {"pairs": str(tmp_path / "pairs"), "batch_size": 8}
    method = recipes.override(MATCHING, {"init_args.regression": regression})
    plan = recipes.plan(in_two_stages(tmp_path / "run", **{"stages.dmd2.method": method}))
    notes = Generators().preflight(plan).notes
    assert any(note.startswith("teacher: sampled with ddim, 2 steps at ") for note in notes)
    (line,) = [note for note in notes if note.startswith("dmd2: ")]
    assert line.startswith("dmd2: not known before the stage ahead of it has trained: ")
    assert str(tmp_path / "pairs") in line


# --- what must not cost a run its export


def test_too_few_images_are_said_before_and_cost_figures_alone(tmp_path: Path):
    image = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = OwnData(TensorData({"image": image, "label": torch.arange(20) % 2}))
    own = {key: value for key, value in config(tmp_path / "run").items() if key != "data"}
    outcome = workbench.run(own, given={"data": data})
    assert any("will not be measured" in note for note in outcome.facts.notes)
    assert outcome.metrics == {}
    assert open_generator(outcome.exported.folder).num_classes == 2


def test_a_teacher_that_cannot_take_its_steps_is_refused_before_the_first(staged: workbench.Outcome, tmp_path: Path):
    teacher = {"class_path": "diffusion.models.Pipeline", "init_args": {"folder": str(staged.exported.folder)}}
    own = {key: value for key, value in config(tmp_path / "run").items() if key != "student"}
    own |= {"teacher": recipes.override(teacher, {"steps": 2000, "sampler": "ddim"}), "method": MATCHING}
    with pytest.raises(SettingsError, match="2000"):
        workbench.run(own)
    assert not (tmp_path / "run").exists()
