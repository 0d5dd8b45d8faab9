"""Folders that plain diffusers wrote, as teachers; and what of them is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pipeline_folders as folders
import pytest
import torch
from safetensors.torch import load_file

from diffusion.codecs import Latents
from diffusion.export import export_generator
from diffusion.methods.dmd2 import DMD2
from diffusion.models import lora, open_generator
from diffusion.models.schedulers import read_scheduler
from diffusion.process import EDMProcess, FlowProcess
from visiondistill import schema
from visiondistill.engine import Optim, Run, Stage, train
from visiondistill.models import require_classes

CPU = torch.device("cpu")


def schedulers():
    import diffusers

    return diffusers


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\n\n  a blue dog\n")
    return str(file)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- what a scheduler says


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "steps_offset": 1}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False, "prediction_type": "sample"}),
        ("PNDMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"trained_betas": [0.01, 0.02, 0.03, 0.04], "num_train_timesteps": 4}),
        ("UniPCMultistepScheduler", {}),
        ("LCMScheduler", {}),
    ],
)
def test_tables_are_those_of_the_scheduler(tmp_path, name, options):
    scheduler = getattr(schedulers(), name)(**options)
    scheduler.save_pretrained(tmp_path)
    read = read_scheduler(tmp_path)
    torch.testing.assert_close(
        read.process.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-6, check_dtype=False
    )
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    assert read.prediction_type == kinds[options.get("prediction_type", "epsilon")]
    assert read.few_steps == (name == "LCMScheduler")
    if name == "DDIMScheduler":
        scheduler.set_timesteps(10)
        assert read.process.timesteps(10)[:-1].tolist() == scheduler.timesteps.tolist()
        assert read.process.final_alpha_cumprod == pytest.approx(scheduler.final_alpha_cumprod.item(), rel=1e-6)


def test_flow_and_consistency_schedulers(tmp_path):
    schedulers().FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "flow")
    flow = read_scheduler(tmp_path / "flow")
    assert repr(flow.process) == repr(FlowProcess(3.0))
    assert (flow.prediction_type, flow.time_scale, flow.few_steps) == ("velocity", 1000, False)
    schedulers().CMStochasticIterativeScheduler(sigma_max=40.0, sigma_data=0.3).save_pretrained(tmp_path / "cm")
    cm = read_scheduler(tmp_path / "cm")
    assert repr(cm.process) == repr(EDMProcess(sigma_max=40.0))
    assert (cm.sigma_data, cm.few_steps, cm.notes) == (
        0.3,
        True,
        ("clip_denoised of its scheduler is left out: the model is read as it is",),
    )


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, r"use_dynamic_shifting=True .* to False"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("CMStochasticIterativeScheduler", {"s_noise": 1.01}, r"s_noise=1.01 .* to 1.0"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("LCMScheduler", {"timestep_scaling": 1.0}, "timestep_scaling=1.0 mixes"),
        ("HeunDiscreteScheduler", {}, "scheduler HeunDiscreteScheduler is not known"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule: schedule='sigmoid' is not allowed"),
        ("DDPMScheduler", {"trained_betas": [0.1, 0.2]}, "2 trained_betas for num_train_timesteps=1000"),
    ],
)
def test_fields_that_are_not_understood_are_refused_by_name(tmp_path, name, options, told):
    getattr(schedulers(), name)(**options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{told}"):
        read_scheduler(tmp_path)


def test_a_table_that_the_fields_do_not_give_is_refused(tmp_path, monkeypatch):
    from diffusers import DDPMScheduler

    DDPMScheduler().save_pretrained(tmp_path)
    made = DDPMScheduler.__init__

    def other(self, *given, **kw):
        made(self, *given, **kw)
        self.alphas_cumprod = self.alphas_cumprod**1.01

    monkeypatch.setattr(DDPMScheduler, "__init__", other)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: the table of the scheduler is not the one"):
        read_scheduler(tmp_path)


# --- folders of pixels


def test_a_pixel_pipeline_denoises_as_its_own_network(tmp_path):
    folder = folders.pixels(tmp_path / "ddpm", schedulers().DDPMScheduler())
    teacher = open_generator(folder)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(teacher.denoiser(x, 400).eps, folders.unet()(x, 400).sample)
    assert (teacher.shape, teacher.input_size, teacher.conditions, teacher.steps) == ((3, 8, 8), (3, 8, 8), None, 50)
    assert teacher.notes == ("clip_sample of its scheduler is left out: the model is read as it is",)
    assert next(open_generator(folder, steps=2).images(2))[0].shape == (2, 3, 8, 8)


def test_a_ddim_teacher_samples_as_its_own_pipeline(tmp_path):
    from diffusers import DiffusionPipeline

    scheduler = schedulers().DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")
    folder = folders.pixels(tmp_path / "ddim", scheduler)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    theirs = pipeline(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt")
    teacher = open_generator(folder)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = teacher.codec.decode(teacher.sample(noise, steps=5)).clamp(0, 1)
    with torch.random.fork_rng():
        torch.testing.assert_close(ours, theirs.images, rtol=0, atol=1e-4)


def test_a_consistency_model_is_opened_in_its_boundary_form(tmp_path):
    from diffusers import DiffusionPipeline

    scheduler = schedulers().CMStochasticIterativeScheduler(num_train_timesteps=1000, clip_denoised=False)
    folder = folders.consistency(tmp_path / "cm", scheduler, classes=3)
    teacher = open_generator(folder)
    torch.manual_seed(0)
    theirs = DiffusionPipeline.from_pretrained(folder)(2, [0, 2], num_inference_steps=4, output_type="pt").images
    torch.manual_seed(0)
    noise, *noises = (torch.randn(2, 3, 8, 8) for _ in range(4))
    ours = teacher.sample(noise, torch.tensor([0, 2]), noises=noises)
    assert (teacher.steps, teacher.sampler) == (4, "student")
    torch.testing.assert_close(teacher.codec.decode(ours).clamp(0, 1), theirs, rtol=0, atol=1e-5)


def test_whether_a_table_holds_a_null_label_is_for_the_user_to_say(tmp_path):
    folder = folders.consistency(tmp_path / "labels", schedulers().DDPMScheduler(), classes=4)
    assert open_generator(folder).num_classes == 4
    assert open_generator(folder).conditions.at([0], CPU)[1] is None
    told = open_generator(folder, num_classes=3, guidance_scale=2.0, steps=2)
    assert told.conditions.at([0], CPU)[1].tolist() == [3]
    assert next(told.images(2))[1].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a null label.*say num_classes=3 if"):
        open_generator(folder, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"num_classes=7 is not allowed.*table of 4 labels"):
        open_generator(folder, num_classes=7)
    plain = folders.pixels(tmp_path / "plain", schedulers().DDPMScheduler())
    with pytest.raises(ValueError, match=r"num_classes=3: the network .* takes no class labels: say num_classes=null"):
        open_generator(plain, num_classes=3)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_table_with_a_label_too_many_may_hold_a_null_label(tmp_path, num_classes):
    folder = folders.consistency(tmp_path / "labels", schedulers().DDPMScheduler(), classes=4)
    teacher = open_generator(folder, num_classes=num_classes)
    with pytest.raises(ValueError, match="visiondistill train --recipe denoising") as refused:
        require_classes(teacher, 7)
    assert ("--teacher.num_classes 3 (where the last of its 4 labels" in str(refused.value)) == (num_classes is None)


def test_a_recipe_names_a_folder(tmp_path):
    folder = folders.pixels(tmp_path / "ddpm", schedulers().DDPMScheduler())
    node = {"class_path": "diffusion.models.Pipeline", "init_args": {"folder": str(folder), "steps": 3}}
    schema.check(node, torch.nn.Module, "teacher")
    assert schema.build(node, torch.nn.Module, "teacher").steps == 3
    (folder / "unet/config.json").unlink()
    with pytest.raises(schema.RecipeError, match=r"^teacher: .*unet/config\.json is missing"):
        schema.build(node, torch.nn.Module, "teacher")


def test_what_a_folder_lacks_is_refused_by_its_name(tmp_path):
    folder = folders.pixels(tmp_path / "ddpm", schedulers().DDPMScheduler())
    weights = folder / "unet/diffusion_pytorch_model.safetensors"

    def refused(told: str) -> None:
        with pytest.raises(ValueError, match=told):
            open_generator(folder)

    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(r"unet cannot be loaded \(where a file is damaged, fetch it again\)")
    weights.unlink()
    refused(r"unet holds no diffusion_pytorch_model\.safetensors: the folder is partly filled")
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")
    refused(r"diffusion_pytorch_model\.bin is a pickle")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    refused(r"one\.safetensors is missing \(0 of 2 shards are there\)")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    from safetensors.torch import load_file, save_file

    weights.write_bytes(whole)
    save_file({name: held for name, held in load_file(weights).items() if name != "conv_in.bias"}, weights)
    refused(r"1 missing tensors, such as conv_in\.bias")
    weights.write_bytes(whole)
    (folder / "scheduler/scheduler_config.json").unlink()
    refused(r"scheduler_config\.json is missing")
    edit(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"])
    refused("the part 'controlnet' of DDPMPipeline is not supported")
    (folder / "model_index.json").write_text("{")
    refused(r"model_index\.json is not readable JSON")
    (folder / "model_index.json").write_text("[]")
    refused(r"model_index\.json holds a list, not an object")
    (folder / "model_index.json").unlink()
    refused(r"model_index\.json is missing")


# --- latents and texts


def test_a_dit_pipeline_works_on_latents_and_its_variance_is_left_out(tmp_path):
    teacher = open_generator(folders.dit(tmp_path / "dit"), steps=2, guidance_scale=3.0)
    assert (teacher.shape, teacher.input_size, teacher.num_classes) == ((4, 8, 8), (3, 16, 16), 10)
    assert isinstance(teacher.codec, Latents)
    images = torch.rand(2, 3, 16, 16)
    latents = teacher.codec.vae.encode(images * 2 - 1).latent_dist.mean * 0.18215
    torch.testing.assert_close(teacher.codec.encode(images), latents)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    model = teacher.denoiser.network.model
    with torch.no_grad():
        both = model(x, timestep=torch.tensor([7, 7]), class_labels=labels).sample
        assert torch.equal(teacher.denoiser(x, 7, labels).eps, both[:, :4])
        assert next(teacher.images(2))[0].shape == (2, 3, 16, 16)


def test_latents_of_videos_are_those_of_their_frames(tmp_path):
    codec = Latents(folders.vae(shift_factor=0.2))
    video = torch.rand(2, 3, 3, 16, 16)
    codes = codec.encode(video)
    assert codes.shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(codes[:, 1], codec.encode(video[:, 1]))
    torch.testing.assert_close(
        codec.encode(video[0])[0], (codec.vae.encode(video[0] * 2 - 1).latent_dist.mean[0] - 0.2) * 0.18215
    )
    assert codec.image_size((3, 4, 8, 8)) == (3, 3, 16, 16)
    assert codec.decode(codes).shape == video.shape
    assert not codec.train().vae.training
    assert not any(p.requires_grad for p in codec.parameters())


def test_a_text_pipeline_denoises_as_its_own_network_with_prompts(tmp_path, prompts):
    from diffusers import DiffusionPipeline

    folder = folders.stable_diffusion(tmp_path / "sd")
    teacher = open_generator(folder, prompts=prompts, guidance_scale=3.0)
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with torch.no_grad():
        condition, null = teacher.conditions.at([1, 2], CPU)
        words, empty = pipeline.encode_prompt(["a blue dog", "a red cat"], "cpu", 1, True)
        assert torch.equal(condition["encoder_hidden_states"], words)
        assert torch.equal(null["encoder_hidden_states"], empty)
        x = torch.randn(2, 4, 8, 8)
        theirs = pipeline.unet(x, 300, encoder_hidden_states=words).sample
        torch.testing.assert_close(teacher.denoiser(x, 300, condition).eps, theirs)
        guided = teacher.denoiser(x, 300, condition, guidance_scale=3.0, null_condition=null).eps
        unguided = pipeline.unet(x, 300, encoder_hidden_states=empty).sample
        torch.testing.assert_close(guided, unguided + 3 * (theirs - unguided))
    assert teacher.process.timesteps(4).tolist() == [751, 501, 251, 1, -1]
    with pytest.raises(ValueError, match="conditioned on text: give `prompts`"):
        open_generator(folder)


def test_embeddings_are_kept_and_a_cache_of_others_is_refused(tmp_path, prompts, monkeypatch):
    folder, cache = folders.stable_diffusion(tmp_path / "sd"), tmp_path / "kept" / "embeddings.safetensors"
    first = open_generator(folder, prompts=prompts, cache=str(cache)).conditions
    monkeypatch.setattr("diffusion.models.prompts._embed", lambda *_: pytest.fail("encoded again"))
    again = open_generator(folder, prompts=prompts, cache=str(cache)).conditions
    for ours, theirs in zip(again.at([0, 1], CPU), first.at([0, 1], CPU), strict=True):
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    Path(prompts).write_text("a cat\n")
    with pytest.raises(ValueError, match=r"embeddings\.safetensors was not made with the prompts of .*prompts\.txt"):
        open_generator(folder, prompts=prompts, cache=str(cache))
    Path(prompts).write_text("a red cat\na blue dog\n")
    edit(folder / "text_encoder/config.json", hidden_act="relu")
    with pytest.raises(ValueError, match=r"embeddings\.safetensors was not made with the encoders of"):
        open_generator(folder, prompts=prompts, cache=str(cache))


@pytest.mark.parametrize(
    ("content", "told"), [(b"\n  \n", "no prompt in it"), (b"\xff", "not UTF-8 at byte 0"), (None, "cannot be read")]
)
def test_prompt_files_that_cannot_be_read_are_named(tmp_path, content, told):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    from diffusion.models import read_prompts

    with pytest.raises(ValueError, match=rf"words\.txt.*{told}"):
        read_prompts(file)


def test_a_network_that_takes_its_guidance_as_an_input_is_refused(tmp_path, prompts):
    from diffusers import UNet2DConditionModel

    folder = folders.stable_diffusion(tmp_path / "sd")
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    UNet2DConditionModel.from_config({**model.config, "time_cond_proj_dim": 8}).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="takes its guidance scale as an input"):
        open_generator(folder, prompts=prompts)


def test_two_text_encoders_and_sizes_reach_an_xl_network(tmp_path, prompts):
    from diffusers import DiffusionPipeline

    folder = folders.stable_diffusion_xl(tmp_path / "xl")
    teacher = open_generator(folder, prompts=prompts)
    condition, null = teacher.conditions.at([0, 1], CPU)
    pipeline = DiffusionPipeline.from_pretrained(folder, add_watermarker=False)
    with torch.no_grad():
        words, empty, pooled, zeros = pipeline.encode_prompt(["a red cat", "a blue dog"], device="cpu")
        assert torch.equal(condition["added_cond_kwargs"]["text_embeds"], pooled)
        assert torch.equal(null["encoder_hidden_states"], empty)
        assert torch.equal(null["added_cond_kwargs"]["text_embeds"], zeros)
        assert not zeros.any()  # this pipeline's empty text is no text at all
        sizes = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
        x = torch.randn(2, 4, 8, 8)
        theirs = pipeline.unet(x, 300, encoder_hidden_states=words, added_cond_kwargs=sizes).sample
        torch.testing.assert_close(teacher.denoiser(x, 300, condition).eps, theirs)


def test_a_flow_transformer_with_its_time_and_shifted_latents(tmp_path, prompts):
    folder = folders.stable_diffusion_3(tmp_path / "sd3", shift=3.0)
    teacher = open_generator(folder, prompts=prompts, steps=2, guidance_scale=2.0)
    condition, _ = teacher.conditions.at([0, 1], CPU)
    x, model = torch.randn(2, 4, 8, 8), teacher.denoiser.network.model
    with torch.no_grad():
        theirs = model(x, timestep=torch.tensor([250.0, 250.0]), **condition).sample
        torch.testing.assert_close(teacher.denoiser(x, 0.25, condition).velocity, theirs)
    assert (teacher.sampler, teacher.codec.shift_factor) == ("euler", 0.1)
    assert next(teacher.images(2))[0].shape == (2, 3, 16, 16)


def test_a_flux_folder_samples_as_its_own_pipeline(tmp_path, prompts):
    from diffusers import FluxPipeline

    folder = folders.flux(tmp_path / "flux")
    teacher = open_generator(folder, prompts=prompts, embedded_guidance=3.5, steps=2)
    assert (teacher.shape, teacher.input_size, teacher.sampler) == ((4, 8, 8), (3, 16, 16), "euler")
    texts = ["a red cat", "a blue dog"]
    theirs = FluxPipeline.from_pretrained(folder)(
        texts, height=16, width=16, num_inference_steps=2, guidance_scale=3.5, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = teacher.sample(noise, teacher.conditions.at([0, 1], torch.device("cpu"))[0], steps=2)
    torch.testing.assert_close(FluxPipeline._pack_latents(ours, 2, 4, 8, 8), theirs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes its guidance scale as an input .*: say embedded_guidance"):
        open_generator(folder, prompts=prompts)


# --- they teach


@pytest.mark.parametrize("kind", ["pixels", "labels", "dit", "text"])
def test_folders_of_others_teach_a_student_that_is_exported_and_opened(tmp_path, prompts, kind):
    made = {
        "pixels": lambda: folders.pixels(tmp_path / "pixels", schedulers().DDPMScheduler()),
        "labels": lambda: folders.consistency(tmp_path / "labels", schedulers().DDPMScheduler(), classes=4),
        "dit": lambda: folders.dit(tmp_path / "dit"),
        "text": lambda: folders.stable_diffusion(tmp_path / "text"),
    }
    teacher = open_generator(made[kind](), prompts=prompts if kind == "text" else None)
    before = [p.clone() for p in teacher.parameters()]
    method = DMD2(teacher, student_every=2, guidance_scale=2.0 if kind in ("dit", "text") else 1.0)
    run = Run(output_dir=str(tmp_path / "run"), batch_size=2, device="cpu", progress=False, checkpoint_every=100)
    optim = {"student": Optim("adam", lr=1e-3), "fake_score": Optim("adam", lr=1e-3)}
    train([Stage(method, steps=3, optim=optim)], run)
    student = method.handover()
    moved = [
        (a - b).abs().max() for a, b in zip(student.denoiser.parameters(), teacher.denoiser.parameters(), strict=True)
    ]
    assert max(moved) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    exported = export_generator(student, tmp_path / "export")
    again = open_generator(exported.folder, prompts=prompts if kind == "text" else None)
    assert torch.equal(next(again.images(2))[0], next(student.images(2))[0])


def test_a_lora_student_learns_adapters_alone(tmp_path, prompts):
    teacher = open_generator(folders.stable_diffusion(tmp_path / "sd"), prompts=prompts)
    student = lora(teacher, rank=2)
    before = {name: p.clone() for name, p in student.denoiser.named_parameters()}
    method = DMD2(teacher, student=student, student_every=1)
    run = Run(output_dir=str(tmp_path / "run"), batch_size=2, device="cpu", progress=False, checkpoint_every=100)
    optim = {"student": Optim("adam", lr=1e-2), "fake_score": Optim("adam", lr=1e-3)}
    train([Stage(method, steps=3, optim=optim)], run)
    moved = {name for name, p in method.product().named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    kept = [name for name in load_file(checkpoint / "weights.safetensors") if "student" in name]
    assert len(kept) == len(moved)
    assert all("lora_" in name for name in kept)
