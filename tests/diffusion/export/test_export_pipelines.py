"""Exports open without this package and sample as the training-time sampler does; what cannot be said is refused."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pipeline_folders as folders
import pytest
import torch
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import nn

from diffusion.codecs import Pixels
from diffusion.denoiser import Denoiser, EDMPreconditioner
from diffusion.export import About, bundle, export_generator, export_lora
from diffusion.generator import Generator
from diffusion.models import Custom, DiT, UNet2D, lora, open_generator, vp
from diffusion.models.folder import assemble
from diffusion.models.schedulers import zero_terminal_snr
from diffusion.process import EDMProcess, FlowProcess, TrigProcess, VPProcess

CPU = torch.device("cpu")


def unet(classes: int | None = None, process=None, kind: str | None = None, channels: int = 3, **kw) -> UNet2D:
    torch.manual_seed(0)
    return UNet2D((channels, 8, 8), classes, process, kind, block_out_channels=(16, 16), **kw)


def student(teacher: Generator, steps: int) -> Generator:
    return teacher.student(teacher.denoiser, steps)


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\na blue dog\n")
    return str(file)


def images(generator: Generator, count: int = 3) -> torch.Tensor:
    return next(generator.images(count, seed=3))[0]


# --- what is written samples rightly, and opens again


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("classes", "process", "kind", "pipeline"),
    [
        (None, None, "v", "ConsistencyModelPipeline"),
        (3, None, "eps", "ConsistencyModelPipeline"),
        (3, vp("squaredcos_cap_v2"), "x0", "ConsistencyModelPipeline"),
        (3, EDMProcess(), None, "ConsistencyModelPipeline"),
        (None, FlowProcess(), None, "DDPMPipeline"),
    ],
)
def test_students_of_pixels(tmp_path, classes, process, kind, pipeline, steps):
    made = student(unet(classes, process, kind), steps)
    exported = export_generator(made, tmp_path / "export")
    assert exported.pipeline == pipeline
    assert exported.largest_difference <= 1e-5
    assert exported.times == tuple(made.times().tolist())
    again = open_generator(exported.folder)
    assert (again.steps, again.sampler, again.num_classes) == (steps, "student", classes)
    assert torch.equal(images(again), images(made))


@pytest.mark.parametrize(
    ("classes", "process", "pipeline"),
    [
        (None, None, "DDIMPipeline"),
        (3, None, "ConsistencyModelPipeline"),
        (None, FlowProcess(), "DDPMPipeline"),
    ],
)
def test_teachers_of_pixels(tmp_path, classes, process, pipeline):
    teacher = unet(classes, process, steps=10)
    exported = export_generator(teacher, tmp_path / "export")
    assert (exported.pipeline, exported.steps) == (pipeline, 10)
    again = open_generator(exported.folder)
    assert torch.equal(images(again), images(teacher))
    if classes:  # the null label stays, to be guided with again
        assert again.conditions.at([0], CPU)[1].tolist() == [classes]


@pytest.mark.parametrize("steps", [1, 4])
def test_latent_students_of_labels_and_of_texts(tmp_path, prompts, steps):
    dit = student(open_generator(folders.dit(tmp_path / "dit")), steps)
    exported = export_generator(dit, tmp_path / "dit_export")
    assert (exported.pipeline, exported.call) == ("DiTPipeline", {"guidance_scale": 1.0})
    assert torch.equal(images(open_generator(exported.folder)), images(dit))
    text = student(open_generator(folders.stable_diffusion(tmp_path / "sd"), prompts=prompts), steps)
    exported = export_generator(text, tmp_path / "sd_export")
    # Without `guidance_scale` the pipeline would guide by 7.5.
    assert (exported.pipeline, exported.call) == ("StableDiffusionPipeline", {})
    assert exported.largest_difference <= 1e-5
    assert torch.equal(images(open_generator(exported.folder, prompts=prompts)), images(text))


def test_of_few_classes_the_card_says_that_the_call_fails_without_guidance_scale(tmp_path):
    import diffusers

    made = student(open_generator(folders.dit(tmp_path / "dit", classes=3)), 1)
    exported = export_generator(made, tmp_path / "export")
    card = (exported.folder / "README.md").read_text()
    assert "`guidance_scale=1` is not optional: without it the call fails.** " in card
    assert "label 1000 for the null label, and this network's table has 3 classes." in card
    pipeline = diffusers.DiTPipeline.from_pretrained(exported.folder)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(IndexError):
        pipeline(class_labels=[0], num_inference_steps=1)
    assert pipeline(class_labels=[0], num_inference_steps=1, guidance_scale=1).images


def test_other_text_pipelines(tmp_path, prompts):
    xl = student(open_generator(folders.stable_diffusion_xl(tmp_path / "xl"), prompts=prompts), 4)
    exported = export_generator(xl, tmp_path / "xl_export")
    assert (exported.pipeline, exported.call) == ("StableDiffusionXLPipeline", {})
    sd3 = student(open_generator(folders.stable_diffusion_3(tmp_path / "sd3"), prompts=prompts), 4)
    exported = export_generator(sd3, tmp_path / "sd3_export")
    assert (exported.pipeline, exported.call) == ("StableDiffusion3Pipeline", {"guidance_scale": 1.0})
    assert torch.equal(images(open_generator(exported.folder, prompts=prompts)), images(sd3))


def test_a_guided_text_teacher_says_its_scale(tmp_path, prompts):
    teacher = open_generator(folders.stable_diffusion(tmp_path / "sd"), prompts=prompts, guidance_scale=3.0, steps=5)
    exported = export_generator(teacher, tmp_path / "export")
    assert exported.call == {"guidance_scale": 3.0}
    assert "guidance_scale=3.0" in (exported.folder / "README.md").read_text()


def test_a_shifted_path_keeps_its_shift_where_diffusers_can_walk_it(tmp_path):
    made = student(unet(process=FlowProcess(3.0)), 2)
    assert torch.equal(images(open_generator(export_generator(made, tmp_path / "export").folder)), images(made))
    with pytest.raises(ValueError, match=r"cannot walk the 4 times 1, 0\.9, 0\.75, 0\.5; its own: 1, 0\.83"):
        export_generator(made, tmp_path / "four", steps=4)
    with pytest.raises(ValueError, match="cannot walk"):
        export_generator(student(unet(process=FlowProcess(num_steps=3)), 2), tmp_path / "snapping")


# --- in a process that knows nothing of us


def test_strangers_get_the_same_images_by_default_calls(tmp_path, prompts):
    made = {
        "one": student(unet(3), 1),
        "four": student(unet(None, kind="eps", channels=1), 4),
        "text": student(open_generator(folders.stable_diffusion(tmp_path / "sd"), prompts=prompts), 4),
        "dit": student(open_generator(folders.dit(tmp_path / "labels")), 4),
    }
    calls = []
    for name, generator in made.items():
        exported = export_generator(generator, tmp_path / name)
        facts = json.loads((exported.folder / "export.json").read_text())
        call = facts["asked"] | facts["call"] | {"num_inference_steps": exported.steps}
        calls.append({"folder": str(exported.folder), "call": call, "generator": facts["seeds_call"]})
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    script = Path(__file__).with_name("sampled.py")
    command = [sys.executable, str(script), str(tmp_path / "calls.json"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    for number, generator in enumerate(made.values()):
        source = torch.Generator().manual_seed(5)
        noise, *noises = (torch.randn(2, *generator.shape, generator=source) for _ in range(generator.steps))
        condition = generator.conditions.at([0, 1], CPU)[0] if generator.conditions else None
        codes = generator.sample(noise, condition, noises=noises)
        ours = generator.codec.decode(codes).clamp(0, 1)
        torch.testing.assert_close(found[str(number)].permute(0, 3, 1, 2), ours, rtol=0, atol=1e-5)


# --- the scheduler's fields


@pytest.mark.parametrize("sampler", ["student", "ddim"])
def test_every_field_of_the_scheduler_is_said(tmp_path, sampler):
    """`from_config` of another scheduler drops those that equal that one's defaults: the table would change."""
    import diffusers

    teacher = unet(process=vp("linear", 1e-4, 0.02), steps=4)
    exported = export_generator(student(teacher, 4) if sampler == "student" else teacher, tmp_path / "export")
    config = json.loads((exported.folder / "scheduler/scheduler_config.json").read_text())
    fields = set(inspect.signature(getattr(diffusers, exported.scheduler)).parameters)
    assert fields <= set(config)
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (1e-4, 0.02, "linear")
    opened = getattr(diffusers, exported.scheduler).from_pretrained(exported.folder / "scheduler")
    torch.testing.assert_close(
        opened.alphas_cumprod.double(), teacher.process.alphas_cumprod, rtol=1e-5, atol=0, check_dtype=False
    )


def test_a_table_without_a_name_is_written_out(tmp_path):
    table = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
    made = student(unet(process=VPProcess(table)), 4)
    exported = export_generator(made, tmp_path / "export")
    again = open_generator(exported.folder)
    torch.testing.assert_close(again.process.alphas_cumprod, table)
    assert len(json.loads((exported.folder / "scheduler/scheduler_config.json").read_text())["trained_betas"]) == 100


def test_a_table_that_ends_at_zero_snr(tmp_path):
    made = student(unet(3, VPProcess(zero_terminal_snr(vp().alphas_cumprod)), "v"), 4)
    exported = export_generator(made, tmp_path / "export")
    assert exported.largest_difference <= 1e-5
    torch.testing.assert_close(images(open_generator(exported.folder)), images(made), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spacing", "steps", "told"),
    [
        ("leading", 3, None),
        ("trailing", 4, None),
        ("trailing", 3, "from 666 it goes to 333, not to 332"),
        ("linspace", 4, "from 999 it goes to 749, not to 666"),
    ],
)
def test_a_teacher_that_diffusers_walks_otherwise_is_refused_before_it_is_trained(tmp_path, spacing, steps, told):
    """Its DDIM goes down by T // steps from each time, whatever the grid says."""
    from diffusers import DDIMScheduler

    folder = folders.pixels(tmp_path / "teacher", DDIMScheduler(timestep_spacing=spacing, clip_sample=False))
    made = open_generator(folder, steps=steps)
    if told is None:
        assert bundle.why_not(made) is None
        assert export_generator(made, tmp_path / "export").largest_difference <= 1e-5
    else:
        assert told in bundle.why_not(made)


def test_a_generator_in_another_precision_is_written_in_float32(tmp_path):
    exported = export_generator(student(unet(3).double(), 4), tmp_path / "export")
    assert torch.equal(images(open_generator(exported.folder)), images(student(unet(3), 4)))


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_one_folder_is_right_for_other_numbers_of_steps_too(tmp_path, asked):
    made = student(unet(3), 4)
    exported = export_generator(made, tmp_path / "export")
    written = bundle.plan(made, 4)
    assert bundle.difference(exported.folder, made, written, asked) <= 1e-5


# --- labels


def test_a_students_labels_are_classes_alone(tmp_path):
    """Asked for nothing, the pipeline draws from the whole table: a null label in it would be drawn too."""
    exported = export_generator(student(unet(3), 1), tmp_path / "export")
    assert json.loads((exported.folder / "unet/config.json").read_text())["num_class_embeds"] == 3


# --- adapters


def random_adapters(generator: Generator, std: float) -> Generator:
    torch.manual_seed(1)
    for name, p in generator.denoiser.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=std)
    return generator


@pytest.mark.parametrize(
    ("make", "part", "time", "theirs"),
    [
        (folders.stable_diffusion, "unet", 999, 999),
        (folders.stable_diffusion_3, "transformer", 1.0, 1000.0),
    ],
)
def test_adapters_keep_their_strength(tmp_path, prompts, make, part, time, theirs):
    import diffusers

    teacher = open_generator(make(tmp_path / "teacher"), prompts=prompts)
    made = random_adapters(lora(teacher, rank=4, alpha=16, steps=4), 1.0)
    export_lora(made, tmp_path / "adapters", about=About("adapters"))
    pipeline = assemble(tmp_path / "teacher", {})
    pipeline.load_lora_weights(tmp_path / "adapters")
    x, (condition, _) = torch.randn(2, 4, 8, 8), made.conditions.at([0, 1], CPU)

    def loaded() -> torch.Tensor:
        return getattr(pipeline, part)(x, timestep=torch.tensor([theirs] * 2), **condition).sample

    with torch.no_grad():
        ours = made.denoiser(x, time, condition).value
        assert (loaded() - ours).abs().max() == 0
        pipeline.disable_lora()
        assert (loaded() - ours).abs().max() > 0.1
    facts = json.loads((tmp_path / "adapters/export.json").read_text())
    scheduler = getattr(diffusers, facts["scheduler"]).from_pretrained(tmp_path / "adapters", subfolder="scheduler")
    scheduler.set_timesteps(4)
    times = made.times()[:-1] * (1 if part == "unet" else 1000)
    torch.testing.assert_close(scheduler.timesteps.double(), times.double())
    assert "guidance_scale=1" in (tmp_path / "adapters/README.md").read_text()


def test_a_lora_student_is_exported_whole_with_its_adapters_merged(tmp_path, prompts):
    teacher = open_generator(folders.stable_diffusion(tmp_path / "sd"), prompts=prompts)
    made = random_adapters(lora(teacher, rank=4, alpha=16, steps=4), 0.1)
    exported = export_generator(made, tmp_path / "export")
    again = open_generator(exported.folder, prompts=prompts)
    torch.testing.assert_close(images(again), images(made), rtol=0, atol=1e-5)
    assert (images(again) - images(student(teacher, 4))).abs().max() > 1e-3


# --- what is refused


def test_what_no_pipeline_can_say_is_refused_with_the_cure(tmp_path):
    plain = EDMPreconditioner(unet(process=EDMProcess()).denoiser.network.network)
    refused = {
        r"cannot walk the 7 times": student(unet(), 7),
        r"boundary form alone.*sigma_min=0.002": student(Generator(Denoiser(plain, EDMProcess()), (3, 8, 8)), 4),
        r"class-conditional UNet2DModel on the linear path.*vp": student(unet(3, FlowProcess()), 1),
        r"guides: export with guidance_scale=1, not 2.0": unet(3, guidance_scale=2.0, steps=2),
        r"'heun' on EDMProcess": unet(process=EDMProcess(), steps=2),
        r"'student' on TrigProcess": student(unet(process=TrigProcess()), 1),
        r"DiTPipeline decodes latents": student(DiT((3, 8, 8), 3, num_layers=1), 1),
        r"Linear is no network of a diffusers pipeline": Custom(nn.Linear(4, 4), (3, 4, 4), vp(), "eps"),
        r"prediction_type='x0' on the linear path": student(unet(process=FlowProcess(), kind="x0"), 1),
    }
    for told, generator in refused.items():
        with pytest.raises(ValueError, match=told):
            export_generator(generator, tmp_path / "export")
    shifted = student(unet(), 1)
    shifted.codec = Pixels(0, 1)
    with pytest.raises(ValueError, match=r"pixels in \[-1, 1\], not Pixels"):
        export_generator(shifted, tmp_path / "export")
    with pytest.raises(ValueError, match="no adapters: export it whole"):
        export_lora(student(unet(), 1), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_an_edm_student_without_boundary_is_exported_for_one_step(tmp_path):
    plain = EDMPreconditioner(unet(3, EDMProcess()).denoiser.network.network)
    labelled = unet(3, EDMProcess())
    made = Generator(
        Denoiser(plain, EDMProcess()), (3, 8, 8), conditions=labelled.conditions, sampler="student", steps=1
    )
    exported = export_generator(made, tmp_path / "export")
    again = open_generator(exported.folder)
    assert again.denoiser.network.sigma_min == 0
    assert torch.equal(images(again), images(made))


def test_a_folder_that_samples_otherwise_gets_no_name(tmp_path, monkeypatch):
    made, right = student(unet(3), 4), bundle.plan

    def wrong(generator, steps):
        written = right(generator, steps)
        written.pipeline.scheduler.register_to_config(prediction_type="epsilon")
        return written

    monkeypatch.setattr(bundle, "plan", wrong)
    with pytest.raises(RuntimeError, match="nothing was exported"):
        export_generator(made, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_overwritten_and_earlier_exports_are(tmp_path):
    made = student(unet(3), 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="not an earlier export"):
        export_generator(made, tmp_path / "mine")
    first = export_generator(made, tmp_path / "export")
    (first.folder / "left_over").write_text("")
    export_generator(made, tmp_path / "export", about=About("again", metrics={"fd": 3.5}))
    assert not (first.folder / "left_over").exists()
    assert "| fd | 3.5 |" in (first.folder / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mine"]


def test_no_bar_counts_the_parts_of_a_folder(tmp_path, prompts, capfd):
    folders.stable_diffusion(tmp_path / "sd")
    assert "%|" in capfd.readouterr().err, "else nothing is tried here"
    made = open_generator(tmp_path / "sd", prompts=prompts)
    open_generator(export_generator(student(made, 1), tmp_path / "export").folder, prompts=prompts)
    assert "%|" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled(), "others still have theirs"


def test_exporting_leaves_the_generator_and_the_random_state(tmp_path):
    made = student(unet(3), 2).train()
    before = {name: held.clone() for name, held in made.state_dict().items()}
    state = torch.get_rng_state()
    export_generator(made, tmp_path / "export")
    assert torch.equal(torch.get_rng_state(), state)
    assert made.training
    assert all(torch.equal(before[name], held) for name, held in made.state_dict().items())
