"""Run folders as generators, of networks that no pipeline of diffusers can say; and what runs of adapters leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pipeline_folders as folders
import pytest
import torch

from diffusion import workshop
from diffusion.generator import Generator
from diffusion.models import Pipeline, Trained
from diffusion.models.folder import assemble
from diffusion.pairs import Pairs
from diffusion.subject import generator_of
from visiondistill import recipes, workbench
from visiondistill.cli import main
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.state import fingerprint
from visiondistill.schema import RecipeError

DIGITS = {"class_path": "visiondistill.data.EmbeddedDigits"}
RUN = {"batch_size": 8, "device": "cpu", "progress": False, "log_every": 1, "checkpoint_every": 1, "keep": 9}
RUN |= {"proof_window": 1, "ema_decay": 0.5}
OPTIM = {"default": {"lr": 1e-2}}
SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4, "steps": 2}
TINY = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 4, "steps": 2}
STUDENTS = {
    "transformer": {"class_path": "diffusion.models.DiT", "init_args": TINY},
    "flow": {
        "class_path": "diffusion.models.UNet2D",
        "init_args": SMALL | {"process": {"class_path": "diffusion.process.FlowProcess"}},
    },
}
"""Class-conditional, and sampled by no pipeline of diffusers."""


def denoising(folder: Path, student: dict[str, Any], **changes: Any) -> recipes.Config:
    method = {"class_path": "diffusion.methods.Denoising"}
    whole = {"data": DIGITS, "student": student, "method": method, "steps": 3, "optim": OPTIM}
    return recipes.override(whole | {"run": RUN | {"output_dir": str(folder)}}, changes)


def matching(folder: Path, teacher: dict[str, Any], **changes: Any) -> recipes.Config:
    method = {"class_path": "diffusion.methods.DMD2", "init_args": {"student_every": 1}}
    whole = {"data": DIGITS, "teacher": teacher, "method": method, "steps": 3, "optim": OPTIM}
    return recipes.override(whole | {"run": RUN | {"output_dir": str(folder)}}, changes)


def trained(run: Path, **options: Any) -> dict[str, Any]:
    return {"class_path": "diffusion.models.Trained", "init_args": {"run": str(run), **options}}


def images(generator: Generator) -> torch.Tensor:
    return next(generator.eval().images(4))[0]


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop, "MEASURED", 16)
        patch.setattr(workshop, "SHOWN", 8)
        yield


@pytest.fixture(scope="module", params=STUDENTS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> workbench.Outcome:
    outcome = workbench.run(denoising(tmp_path_factory.mktemp(request.param) / "run", STUDENTS[request.param]))
    assert outcome.exported is None
    return outcome


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> workbench.Outcome:
    config = denoising(tmp_path_factory.mktemp("one") / "run", STUDENTS["transformer"])
    return workbench.run(config, artefacts=False)


# --- the same generator


def test_a_run_opens_as_what_it_made(teacher: workbench.Outcome):
    opened = Trained(str(teacher.folder))
    assert (opened.steps, opened.sampler, opened.num_classes) == (2, teacher.student.sampler, 10)
    assert torch.equal(images(opened), images(teacher.student))
    assert opened.guidance == teacher.student.guidance
    raw = Trained(str(teacher.folder), use="raw", sampler="student", steps=1, guidance_rescale=0.5)
    assert (raw.steps, raw.sampler) == (1, "student")
    assert raw.guidance == teacher.student.guidance | {"guidance_rescale": 0.5}
    made = teacher.result.product
    assert fingerprint(raw.state_dict()) == fingerprint(made.state_dict()) != fingerprint(opened.state_dict())
    assert not any(part.training for part in raw.modules() if part is not raw)


def test_a_run_without_an_export_is_measured(teacher: workbench.Outcome, tmp_path: Path):
    words = ["--run", str(teacher.folder), "--extractor", "random", "--count", "16", "--output_dir", str(tmp_path)]
    made = {"ema": teacher.student, "raw": teacher.result.product}
    for use, generator in made.items():
        assert main(["evaluate", "fd", *words, "--cache_dir", str(tmp_path), "--generator.use", use]) == 0
        read = json.loads((tmp_path / "fd_random.json").read_text())
        assert read["generator"]["sha256"] == fingerprint(generator.state_dict())
        assert (read["count"], read["steps"]) == (16, 2)


def test_pairs_of_a_run_without_an_export_are_what_it_makes(teacher: workbench.Outcome, tmp_path: Path):
    words = ["--run", str(teacher.folder), "--count", "3", "--output_dir", str(tmp_path)]
    assert main(["store", "pairs", *words, "--generator.guidance_scale", "2"]) == 0
    guided = Trained(str(teacher.folder), guidance_scale=2.0)
    held = Pairs(tmp_path, guided).columns
    condition, null = guided.conditions.at(range(3), torch.device("cpu"))
    torch.testing.assert_close(held["code"], guided.sample(held["noise"], condition, null))
    unguided = teacher.student.sample(held["noise"], condition)
    assert (held["code"] - unguided).abs().max() > 1e-3


def test_an_export_comes_first_where_there_is_one(tmp_path: Path):
    student = {"class_path": "diffusion.models.UNet2D", "init_args": SMALL}
    outcome = workbench.run(denoising(tmp_path / "run", student))
    assert isinstance(generator_of(str(tmp_path / "run"), None, {}), Pipeline)
    shutil.rmtree(outcome.exported.folder)
    opened = generator_of(str(tmp_path / "run"), None, {"generator.steps": 1})
    assert (type(opened), opened.steps) == (Trained, 1)
    assert torch.equal(images(Trained(str(tmp_path / "run"))), images(outcome.student))


# --- as a teacher


def test_a_run_teaches_the_next(teacher: workbench.Outcome, tmp_path: Path):
    outcome = workbench.run(matching(tmp_path / "run", trained(teacher.folder, guidance_scale=2.0)))
    taught_by = outcome.result.method.teacher
    assert fingerprint(taught_by.denoiser.state_dict()) == fingerprint(teacher.student.denoiser.state_dict())
    assert outcome.result.method.guidance_scale == 2
    digest = fingerprint(teacher.student.state_dict())
    said = f"teacher: EMA weights of {teacher.folder} after step 3 of 3, sha256 {digest}"
    assert said in json.loads((tmp_path / "run" / "preflight.json").read_text())["notes"]
    # Its run, which has no export either, is opened with the one that taught it.
    assert torch.equal(images(Trained(str(tmp_path / "run"))), images(outcome.student))
    assert not torch.equal(images(outcome.student), images(taught_by.student(taught_by.denoiser, 1)))


def test_a_run_with_such_a_teacher_resumes_wherever_that_lies(transformer: workbench.Outcome, tmp_path: Path):
    whole = workbench.run(matching(tmp_path / "whole", trained(transformer.folder)), artefacts=False)
    shutil.copytree(transformer.folder, tmp_path / "moved")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / f"step_{step:09d}")
    config = matching(tmp_path / "half", trained(tmp_path / "moved"), **{"run.resume": "auto"})
    with pytest.raises(SettingsError, match="hold other weights"):
        workbench.run(recipes.override(config, {"teacher.use": "raw"}), artefacts=False)
    resumed = workbench.run(config, artefacts=False)
    assert resumed.result.step == 3
    assert torch.equal(images(resumed.student), images(whole.student))


# --- what is refused


def test_files_that_lie_elsewhere_are_named(transformer: workbench.Outcome, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(transformer.folder, folder)
    elsewhere = {"class_path": "visiondistill.data.ImageFolder", "init_args": {"root": str(tmp_path / "nowhere")}}
    config = recipes.load(folder / "config.yaml") | {"data": elsewhere}
    (folder / "config.yaml").write_text(recipes.dump(config))
    with pytest.raises(RecipeError, match=r"config.yaml cannot be built again: data: .*nowhere"):
        Trained(str(folder))
    here = {"data.class_path": DIGITS["class_path"]}
    assert torch.equal(images(Trained(str(folder), changes=here)), images(transformer.student))
    assert torch.equal(images(generator_of(str(folder), None, here)), images(transformer.student))
    with pytest.raises(SettingsError, match="nowhere"):
        generator_of(str(folder), None, here | {"generator.changes": {}})


def test_what_is_no_generators_run_is_refused(transformer: workbench.Outcome, tmp_path: Path):
    with pytest.raises(ValueError, match="not a run folder"):
        Trained(str(tmp_path))
    shutil.copy(transformer.folder / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        Trained(str(tmp_path))
    with pytest.raises(ValueError, match="kept no average"):
        Trained(str(transformer.folder), use="ema", changes={"run.ema_decay": None})
    with pytest.raises(ValueError, match="sampler='heun' needs continuous time"):
        Trained(str(transformer.folder), sampler="heun")
    with pytest.raises(SettingsError, match="stepz"):
        generator_of(str(transformer.folder), None, {"generator.stepz": 3})


def test_a_run_of_a_classifier_is_refused(tmp_path: Path):
    student = {"class_path": "visiondistill.models.SmallConvNet", "init_args": {"widths": [4, 8]}}
    terms = {"ce": {"class_path": "visiondistill.terms.CE"}}
    method = {"class_path": "visiondistill.Distiller", "init_args": {"terms": terms}}
    workbench.run(denoising(tmp_path / "run", student, **{"method": method, "steps": 1}), artefacts=False)
    with pytest.raises(ValueError, match="is no generator: name another run"):
        Trained(str(tmp_path / "run"))


# --- adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> workbench.Outcome:
    place = tmp_path_factory.mktemp("adapted")
    folders.stable_diffusion(place / "teacher")
    (place / "prompts.txt").write_text("a cat\na dog\n")
    said = {"folder": str(place / "teacher"), "prompts": str(place / "prompts.txt")}
    teacher = {"class_path": "diffusion.models.Pipeline", "init_args": said}
    student = {"class_path": "diffusion.models.lora", "init_args": {"rank": 4, "alpha": 16}}
    config = matching(place / "run", teacher, **{"student": student, "optim.default.lr": 0.1})
    return workbench.run({key: value for key, value in config.items() if key != "data"})


def test_a_run_of_adapters_leaves_them_at_their_strength(adapted: workbench.Outcome):
    place = adapted.folder.parent
    pipeline = assemble(place / "teacher", {})
    pipeline.load_lora_weights(adapted.folder / "export" / "lora")
    x, (condition, _) = torch.randn(2, 4, 8, 8), adapted.student.conditions.at([0, 1], torch.device("cpu"))

    def loaded() -> torch.Tensor:
        return pipeline.unet(x, timestep=torch.tensor([999, 999]), **condition).sample

    with torch.no_grad():
        ours = adapted.student.denoiser(x, 999, condition).value
        assert (loaded() - ours).abs().max() == 0
        pipeline.disable_lora()
        assert (loaded() - ours).abs().max() > 1e-3
    card = (adapted.folder / "export" / "README.md").read_text()
    assert "these are in `lora/`" in card
    assert "`lora/pytorch_lora_weights.safetensors`: sha256" in card


def test_adapters_are_exported_again_with_the_rest(adapted: workbench.Outcome, tmp_path: Path):
    files = {}
    for use in ("ema", "raw"):
        words = ["--run", str(adapted.folder), "--output_dir", str(tmp_path / use), "--weights", use]
        assert main(["export", *words]) == 0
        files[use] = (tmp_path / use / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    at_the_end = adapted.folder / "export" / "lora" / "pytorch_lora_weights.safetensors"
    assert files["ema"] == at_the_end.read_bytes() != files["raw"]
