"""One adapter for all of diffusers' networks, another for anyone's own; new networks; LoRA students; half precision."""

from __future__ import annotations

import math

import pytest
import torch
from mnist_ddpm import digits, published, published_path
from safetensors.torch import save_file
from torch import nn

from diffusion.conditions import ClassLabels
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.models import Custom, DiffusersNetwork, DiT, UNet2D, checkpoint_gradients, frozen_copy, lora, vp
from diffusion.models.lora import lora_state, merged
from diffusion.process import EDMProcess, FlowProcess, VPProcess
from visiondistill import schema

SMALL = {"block_out_channels": (16, 16)}


def unet(**kw) -> UNet2D:
    torch.manual_seed(0)
    return UNet2D((1, 8, 8), **SMALL | kw)


# --- the adapter


def test_class_labels_and_time_reach_the_model_as_diffusers_has_them():
    generator = unet(num_classes=3)
    model, x, labels = generator.denoiser.network.model, torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(generator.denoiser(x, 7, labels).value, model(x, 7, class_labels=labels).sample)
        assert not torch.equal(model(x, 7, class_labels=labels).sample, model(x, 8, class_labels=labels).sample)
    assert model.config.num_class_embeds == 4


def test_models_of_continuous_time_have_it_in_thousandths():
    flow, edm = unet(process=FlowProcess()), unet(process=EDMProcess())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        model = flow.denoiser.network.model
        torch.testing.assert_close(flow.denoiser(x, 0.25).value, model(x, 250.0).sample)
        inner, time = edm.denoiser.network.network, torch.tensor(math.log(3) / 4)
        torch.testing.assert_close(inner(x, time.expand(2)), inner.model(x, 1000 * time).sample)


def test_an_edm_network_is_preconditioned_in_the_boundary_form():
    edm = unet(process=EDMProcess(sigma_min=0.01))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(edm.denoiser(x, 0.01).x0, x)
        assert (edm.denoiser(x, 1.0).x0 - x).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"prediction_type='eps'.*x0"):
        unet(process=EDMProcess(), prediction_type="eps")


class Learned(nn.Module):
    """Predicts, and says a variance besides, for images or for videos with their channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        self.seen = sample.shape, timestep, encoder_hidden_states.dtype
        return (torch.cat([sample * self.weight, torch.full_like(sample, 7.0)], 1),)


def test_of_a_model_that_learns_its_variance_the_prediction_alone_is_returned():
    model, x = Learned(), torch.randn(2, 3, 4, 4)
    network = DiffusersNetwork(model)
    assert torch.equal(network(x, torch.tensor([1, 2]), {"encoder_hidden_states": torch.zeros(2, 5)}), x)


def test_videos_go_in_with_their_channels_first_and_times_by_frame():
    model, x = Learned(), torch.randn(2, 5, 3, 4, 4)
    times = torch.rand(2, 5)
    assert torch.equal(DiffusersNetwork(model, 1000)(x, times, {"encoder_hidden_states": torch.zeros(2, 5)}), x)
    assert model.seen[0] == (2, 3, 5, 4, 4)
    assert torch.equal(model.seen[1], times * 1000)
    DiffusersNetwork(model, frame_axis=1).model.forward = lambda sample, **_: (sample,)
    assert torch.equal(DiffusersNetwork(model, frame_axis=1)(x, times, {}), x)


def tiny_wan(patch_size: tuple[int, int, int] = (1, 2, 2)) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=patch_size,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )


def test_sana_and_wan_are_called_as_the_others():
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    sana = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    words, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x, condition = torch.randn(2, 4, 8, 8), {"encoder_hidden_states": words, "encoder_attention_mask": mask}
    with torch.no_grad():
        theirs = sana(x, words, torch.tensor([300.0, 300.0]), encoder_attention_mask=mask).sample
        ours = Denoiser(DiffusersNetwork(sana, 1000), FlowProcess(), "velocity")(x, 0.3, condition).velocity
        torch.testing.assert_close(ours, theirs)
        wan = tiny_wan()
        video = torch.randn(2, 3, 4, 8, 8)
        theirs = wan(video.transpose(1, 2), torch.tensor([300.0, 300.0]), words).sample.transpose(1, 2)
        network = DiffusersNetwork(wan, 1000)
        torch.testing.assert_close(network(video, torch.full((2,), 0.3), {"encoder_hidden_states": words}), theirs)


def test_wan_gets_the_time_of_a_frame_at_each_of_its_tokens():
    torch.manual_seed(0)
    wan = tiny_wan((1, 2, 4))
    network, video, words = DiffusersNetwork(wan, 1000), torch.randn(2, 3, 4, 8, 8), torch.randn(2, 5, 8)
    condition = {"encoder_hidden_states": words}
    with torch.no_grad():
        whole = network(video, torch.tensor([0.3, 0.6]), condition)
        torch.testing.assert_close(network(video, torch.tensor([[0.3] * 3, [0.6] * 3]), condition), whole)
        times = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.4, 0.3]])
        tokens = torch.tensor([[1000 * time for time in row for _ in range(4 * 2)] for row in times.tolist()])
        theirs = wan(video.transpose(1, 2), tokens, words).sample.transpose(1, 2)
        torch.testing.assert_close(network(video, times, condition), theirs)
        denoiser, guided = Denoiser(network, FlowProcess(), "velocity"), {"encoder_hidden_states": words.flip(0)}
        value = denoiser(video, times, condition, guidance_scale=2.0, null_condition=guided).velocity
        torch.testing.assert_close(value, 2 * theirs - network(video, times, guided))
        # Attention is global: another time for the last frame is felt in the first.
        later = times.clone()
        later[:, 2] = 0.7
        assert (network(video, later, condition) - theirs).abs().flatten(2).amax(2).min() > 1e-6
    with pytest.raises(ValueError, match=r"t of shape \(2, 4\): a token of this Wan spans 2 frames: give t \[B\]"):
        DiffusersNetwork(tiny_wan((2, 2, 2)))(torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4), condition)


def test_wan_in_half_precision_keeps_some_weights_and_takes_half_codes(tmp_path):
    torch.manual_seed(0)
    wan, video, words = tiny_wan(), torch.randn(2, 3, 4, 8, 8), torch.randn(2, 5, 8)
    wan.save_pretrained(tmp_path)
    half = type(wan).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.float32, torch.bfloat16}
    with torch.no_grad():
        ours, theirs = (
            DiffusersNetwork(m, 1000)(video, torch.full((2, 3), 0.3), {"encoder_hidden_states": words})
            for m in (half, wan)
        )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


# --- Flux


def tiny_flux(**kw) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
        **kw,
    )


def texts(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.randn(rows, 5, 8), "pooled_projections": torch.randn(rows, 6)}


def as_its_pipeline(flux: nn.Module, x: torch.Tensor, t: float, condition: dict, **kw) -> torch.Tensor:
    """Flux's velocity at codes `[B, C, H, W]`, by the helpers of its own pipeline (whose autoencoder takes 1/8)."""
    from diffusers import FluxPipeline

    rows, channels, height, width = x.shape
    velocity = flux(
        FluxPipeline._pack_latents(x, rows, channels, height, width),
        timestep=torch.full((rows,), t),
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(condition["encoder_hidden_states"].shape[1], 3),
        **condition,
        **kw,
    ).sample
    return FluxPipeline._unpack_latents(velocity, height * 8, width * 8, 8)


def test_flux_is_called_as_its_pipeline_calls_it_guided_or_not():
    flux, x = tiny_flux(), torch.randn(2, 4, 8, 6)
    condition, null = texts(), texts()
    denoiser = Denoiser(DiffusersNetwork(flux, 1000), FlowProcess(), "velocity")
    with torch.no_grad():
        theirs, empty = (as_its_pipeline(flux, x, 0.3, each) for each in (condition, null))
        torch.testing.assert_close(denoiser(x, 0.3, condition).velocity, theirs)
        for batched in (True, False):
            denoiser.batched_guidance = batched
            guided = denoiser(x, 0.3, condition, guidance_scale=3.0, null_condition=null).velocity
            torch.testing.assert_close(guided, empty + 3 * (theirs - empty), rtol=1e-4, atol=1e-5)


def test_a_distilled_flux_always_gets_its_guidance_scale():
    flux, x, condition = tiny_flux(guidance_embeds=True), torch.randn(2, 4, 8, 8), texts()
    network = DiffusersNetwork(flux, 1000, embedded_guidance=3.5)
    with torch.no_grad():
        ours = network(x, torch.full((2,), 0.3), condition)
        torch.testing.assert_close(ours, as_its_pipeline(flux, x, 0.3, condition, guidance=torch.full((2,), 3.5)))
        other = as_its_pipeline(flux, x, 0.3, condition, guidance=torch.full((2,), 1.0))
        assert (ours - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"its guidance scale as an input .*: say embedded_guidance"):
        DiffusersNetwork(flux, 1000)
    with pytest.raises(ValueError, match=r"embedded_guidance=3.5: FluxTransformer2DModel takes no guidance scale"):
        DiffusersNetwork(tiny_flux(), 1000, embedded_guidance=3.5)


def test_gradients_and_taps_go_through_flux():
    flux, x, condition = tiny_flux(), torch.randn(2, 4, 8, 8, requires_grad=True), texts()
    denoiser = checkpoint_gradients(Denoiser(DiffusersNetwork(flux, 1000), FlowProcess(), "velocity"))
    prediction, (feature, tokens) = denoiser.features(x, 0.3, condition, taps=["transformer_blocks.0.ff", "norm_out"])
    assert feature.shape == tokens.shape == (2, 16, 16)
    prediction.velocity.square().mean().backward()
    assert all(p.grad.any() for p in flux.parameters())
    ours, x.grad = x.grad, None
    as_its_pipeline(flux, x, 0.3, condition).square().mean().backward()
    torch.testing.assert_close(ours, x.grad)
    half = frozen_copy(Generator(denoiser, (4, 8, 8)))
    with torch.no_grad():
        near = half.denoiser(x, 0.3, condition).velocity
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, prediction.velocity.detach(), rtol=0, atol=0.05)


def test_what_flux_does_not_take_is_refused():
    network, t, x = DiffusersNetwork(tiny_flux(), 1000), torch.rand(2), torch.randn(2, 4, 8, 8)
    for codes in (x[:, :3], x[:, :, :7], torch.randn(2, 16, 16), torch.randn(2, 3, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"x_t of shape .*: this Flux takes \[B, 4, H, W\] with even H and W"):
            network(codes, t, texts())
    with pytest.raises(ValueError, match="the condition names nothing: Flux takes encoder_hidden_states and pooled"):
        network(x, t)
    with pytest.raises(ValueError, match=r"the condition names .*txt_ids: .*its ids are made for it"):
        network(x, t, texts() | {"txt_ids": torch.zeros(5, 3)})


def test_a_bf16_copy_keeps_the_callers_precision_and_leaves_the_original():
    generator = unet(num_classes=3)
    teacher = frozen_copy(generator)
    half = teacher.denoiser
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        ours, theirs = half(x, 5, labels).value, generator.denoiser(x, 5, labels).value
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() < 0.05
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in half.parameters())
    assert {p.dtype for p in generator.parameters()} == {torch.float32}
    assert (teacher.conditions, teacher.codec) == (generator.conditions, generator.codec)
    DiffusersNetwork(model := Learned().bfloat16())(x, torch.zeros(2), {"encoder_hidden_states": torch.zeros(2, 5)})
    assert model.seen[2] == torch.bfloat16


def test_dit_drops_no_labels_of_its_own_while_it_trains():
    torch.manual_seed(0)
    denoiser = DiT((1, 8, 8), 3, num_layers=1).denoiser.train()
    nn.init.normal_(denoiser.network.model.proj_out_2.weight)
    x, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 3
    assert torch.equal(denoiser(x, 5, labels).value, denoiser(x, 5, labels).value)


def test_gradients_are_the_same_with_checkpointing():
    plain, saving = unet(), unet(gradient_checkpointing=True)
    x = torch.randn(2, 1, 8, 8)
    for each in (plain, saving):
        each.denoiser(x, 5).value.square().mean().backward()
    assert saving.denoiser.network.model.down_blocks[0].gradient_checkpointing
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="Learned has no gradient checkpointing"):
        checkpoint_gradients(Denoiser(DiffusersNetwork(Learned()), FlowProcess()))


# --- new generators


@pytest.mark.parametrize("process", [vp(), EDMProcess(), FlowProcess()])
@pytest.mark.parametrize("classes", [None, 3])
def test_new_generators_make_images_on_every_path(process, classes):
    images, labels = next(unet(process=process, num_classes=classes, steps=2).images(3))
    assert images.shape == (3, 1, 8, 8)
    assert (labels is None) == (classes is None)


def test_sizes_and_widths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="size=6 is not allowed: 3 widths halve it 2 times"):
        UNet2D((1, 6, 6), block_out_channels=(16, 16, 16))
    with pytest.raises(ValueError, match="size=4 is not allowed"):  # the last map would have one pixel
        UNet2D((1, 4, 4), block_out_channels=(16, 16, 16))
    with pytest.raises(ValueError, match="norm_num_groups=8 is not allowed: it must divide"):
        UNet2D((1, 8, 8), block_out_channels=(12, 16))
    with pytest.raises(ValueError, match="patch_size=3 is not allowed"):
        DiT((1, 8, 8), 3, patch_size=3)
    for network in (UNet2D, DiT):
        with pytest.raises(ValueError, match=r"input_size=\[1, 8, 4\] is not allowed: images must be square"):
            network((1, 8, 4), num_classes=3)


def test_a_recipe_names_them_with_their_process():
    node = {
        "class_path": "diffusion.models.UNet2D",
        "init_args": {
            "input_size": [1, 8, 8],
            "block_out_channels": [16, 16],
            "process": {"class_path": "diffusion.models.vp", "init_args": {"schedule": "squaredcos_cap_v2"}},
        },
    }
    schema.check(node, nn.Module, "teacher")
    built = schema.build(node, nn.Module, "teacher")
    assert repr(built.process) == repr(VPProcess.from_betas("squaredcos_cap_v2"))
    node["init_args"]["process"]["init_args"]["schedul"] = "linear"
    with pytest.raises(schema.RecipeError, match=r"teacher\.process\.schedul: vp takes no such key"):
        schema.check(node, nn.Module, "teacher")


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels=None):
        self.seen = t, labels
        return x * self.scale


def test_anyones_network_gets_its_own_time_range_and_weights(tmp_path):
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "own.pth")
    network = Own()
    generator = Custom(network, (1, 4, 4), vp(), "eps", 0.001, -0.5, 0.5, 3, str(tmp_path / "own.pth"), steps=2)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(generator.denoiser(x, 250, torch.tensor([0, 3])).value, x * 2)
    torch.testing.assert_close(network.seen[0], torch.tensor([0.25, 0.25]))
    assert network.seen[1].tolist() == [0, 3]
    assert generator.codec.encode(torch.tensor([0.0, 1.0])).tolist() == [-0.5, 0.5]
    assert isinstance(generator.conditions, ClassLabels)
    assert generator.conditions.null
    torch.save({"other": torch.tensor(2.0)}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own.pth do not fit Own"):
        Custom(Own(), (1, 4, 4), vp(), "eps", weights=str(tmp_path / "own.pth"))
    torch.save(Own(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own.pth: this pickle holds more than tensors"):
        Custom(Own(), (1, 4, 4), vp(), "eps", weights=str(tmp_path / "own.pth"))


@pytest.mark.parametrize("name", ["own.pth", "own.safetensors"])
@pytest.mark.parametrize("left", [0, 100])
def test_weights_that_were_cut_short_are_named(tmp_path, name, left):
    file = tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)({"scale": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"weights .*{name}: not a readable"):
        Custom(Own(), (1, 4, 4), vp(), "eps", weights=str(file))


class OfLabels(nn.Module):
    """Its table has no row for a null label."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1)

    def forward(self, x, t, labels):
        return x + self.table(labels)[..., None, None]


def test_a_network_without_a_null_label_is_sampled_and_not_guided():
    options = {"process": FlowProcess(), "prediction_type": "velocity", "num_classes": 3, "steps": 2}
    images, labels = next(Custom(OfLabels(), (1, 4, 4), **options, null_label=False).images(4))
    assert (images.shape, labels.tolist()) == ((4, 1, 4, 4), [0, 1, 2, 0])
    guided = Custom(OfLabels(), (1, 4, 4), **options, null_label=False, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a null_condition; 1 switches guidance off"):
        next(guided.images(4))


def test_a_published_model_of_another_class_denoises_as_its_author_says(shared_dir):
    teacher, process = published(shared_dir), published_path()
    torch.testing.assert_close(
        teacher.denoiser.network.model.alpha_t.double(), process.alphas_cumprod, rtol=1e-4, atol=0
    )
    x0 = teacher.codec.encode(digits(shared_dir, 32) / 255)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    # Mean squared errors of the noise that stand beside the file.
    for t, told in {50: 0.061, 200: 0.029, 500: 0.0054, 900: 0.0008}.items():
        with torch.no_grad():
            error = (teacher.denoiser(process.add_noise(x0, noise, t), t).eps - noise).square().mean().item()
        assert error == pytest.approx(told, rel=0.1)


# --- LoRA


def test_a_lora_student_shares_its_teachers_weights_and_starts_as_its_function():
    teacher = unet(num_classes=3)
    student = lora(teacher, rank=2, alpha=8, steps=4)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(student.denoiser(x, 5, labels).value, teacher.denoiser(x, 5, labels).value)
    frozen = {id(p) for p in student.denoiser.parameters() if not p.requires_grad}
    assert frozen == {id(p) for p in teacher.denoiser.parameters()}
    trained = [name for name, p in student.denoiser.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    assert (student.steps, student.sampler) == (4, "student")
    with pytest.raises(ValueError, match="has adapters already"):
        lora(student)
    with pytest.raises(ValueError, match=r"target_modules=\['nowhere'\]"):
        lora(unet(), target_modules=["nowhere"])


def test_merged_adapters_are_the_same_function_and_leave_the_shared_weights():
    teacher = unet()
    student = lora(teacher, rank=2, alpha=8)
    before = teacher.denoiser.network.model.mid_block.attentions[0].to_q.weight.clone()
    for name, p in student.denoiser.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    whole, x = merged(student.denoiser), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(whole(x, 5).value, student.denoiser(x, 5).value)
        assert (student.denoiser(x, 5).value - teacher.denoiser(x, 5).value).abs().max() > 1e-3
    assert whole.state_dict().keys() == teacher.denoiser.state_dict().keys()
    assert torch.equal(teacher.denoiser.network.model.mid_block.attentions[0].to_q.weight, before)
    assert len(lora_state(student.denoiser)) == 8
