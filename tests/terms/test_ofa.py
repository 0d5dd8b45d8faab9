"""One-for-All: heads as released, for networks of every kind, and what is left of it without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distilling import CLASSES, MIXED, apart, distiller, net, play, prepared, weights
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from visiondistill import Distiller
from visiondistill.augmentors import Mix
from visiondistill.data import Stream, TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.heads import DualHead
from visiondistill.losses import ofa_loss
from visiondistill.models import Network, SmallConvNet, SmallMLP, Timm
from visiondistill.teachers import Teacher
from visiondistill.terms import CE, KL, OFA, Peer, Term
from visiondistill.terms.ofa import ConvolutionHead, TokenHead, separable_block
from visiondistill.weighting import Fixed

# --- equality with the released heads


@pytest.fixture(scope="module")
def released(shared_dir) -> dict[str, dict[str, Any]]:
    cases = torch.load(shared_dir / "reference_values" / "kd" / "ofa_projectors.pt", weights_only=True)["cases"]
    return {case["name"]: case for case in cases}


def in_order(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """With the released module's state, which is in the order of registration."""
    module = module.double()
    assert [t.shape for t in module.state_dict().values()] == [t.shape for t in state.values()]
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))
    return module


def split(tokens: Tensor, prefixes: int) -> tuple[Tensor, Tensor | None]:
    """`[B, n + g * g, C]` as a network gives it: a map, and the prefix tokens if there are any."""
    patches = tokens[:, prefixes:]
    side = int(patches.shape[1] ** 0.5)
    return patches.mT.unflatten(2, (side, side)), tokens[:, :prefixes] if prefixes else None


def answer(module: nn.Module, x: Tensor, prefixes: int) -> Tensor:
    if x.ndim == 3:
        return module(*split(x, prefixes))
    return module(x) if isinstance(module, nn.Sequential) else module(x, None)


RELEASED = {
    "SepConv_8to16_56": (lambda: separable_block(8, 16), 0),
    "cnn_projector_stage3_C16_teacherdim20_K10": (lambda: ConvolutionHead(3, 16, 32, 10), 0),
    "vit_projector_stage1_D16_cls1_K10": (lambda: TokenHead(1, 16, 16, 1, 10), 1),
    "mlp_projector_stage2_D16_notoken_K10": (lambda: TokenHead(2, 16, 16, 1, 10), 0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_heads_equal_the_released_ones(name: str, released) -> None:
    case, (build, prefixes) = released[name], RELEASED[name]
    inputs, outputs = case["inputs"], case["outputs"]
    module, x = in_order(build(), inputs["state_dict"]), inputs["x"].clone().requires_grad_()
    value = answer(module.train(), x, prefixes)
    torch.testing.assert_close(value, outputs["y_train"], rtol=1e-9, atol=1e-10)
    several = list(module.parameters())[: len(inputs["param_names"])]
    gradients = torch.autograd.grad(value.square().sum(), [x, *several])
    expected = [case["grads"]["x_of_sum_y2"], *case["grads"]["params_of_sum_y2"]]
    torch.testing.assert_close(gradients, tuple(expected), rtol=1e-9, atol=1e-9)
    fresh = in_order(build(), inputs["state_dict"]).eval()
    torch.testing.assert_close(answer(fresh, inputs["x"], prefixes), outputs["y_eval"], rtol=1e-9, atol=1e-10)


STUDENTS = {
    "resnet18": ("convolutions", 512, [(64, 0), (128, 0), (256, 0), (512, 0)]),
    "resnet50": ("convolutions", 2048, [(256, 0), (512, 0), (1024, 0), (2048, 0)]),
    "mobilenetv1": ("convolutions", 1024, [(128, 0), (256, 0), (512, 0), (1024, 0)]),
    "deit_tiny": ("tokens", 192, [(192, 1)] * 4),
    "vit_small": ("tokens", 384, [(384, 1)] * 4),
    "resmlp12(384)": ("tokens", 384, [(384, 1)] * 4),
    "swin_pico": ("tokens", 384, [(48, 3), (96, 2), (192, 1), (384, 0)]),
}
TEACHERS = {"deit_tiny(192)": 192, "swin_tiny(768)": 768, "resnet50(2048)": 2048, "resnet50": 2048}


def test_parameter_counts_are_the_released_ones(released) -> None:
    """For every pair that is recorded: channels and numbers of mergings of the student's four stages."""
    counts = released["official_extra_parameter_counts"]["outputs"]
    for pair, expected in counts.items():
        (student, rest) = pair.split("<-")
        teacher, _, classes = rest.rpartition("_K")
        kind, width, stages = STUDENTS[student]
        for stage, (channels, merges) in enumerate(stages, 1):
            if kind == "tokens":
                head: nn.Module = TokenHead(stage, channels, width, merges, int(classes))
            else:
                head = ConvolutionHead(stage, channels, max(width, TEACHERS[teacher]), int(classes))
            assert sum(p.numel() for p in head.parameters()) == expected["per_stage"][str(stage)], (pair, stage)
    assert len(counts) >= 16


def test_initial_weights_are_drawn_as_released() -> None:
    torch.manual_seed(0)
    heads = ready(vit(24, 8, classes=300), OFA()).players["ofa_heads"]
    linear = [m for m in heads.modules() if isinstance(m, nn.Linear)]
    assert all(m.bias is None or not m.bias.any() for m in linear)
    assert torch.cat([m.weight.flatten() for m in linear]).std().item() == pytest.approx(0.02, rel=0.02)
    torch.manual_seed(0)
    heads = ready(Network(SmallConvNet((32, 64), in_channels=3), input_size=(3, 32, 32)), OFA((3, 4)), 64)
    convolutions = [m for m in heads.players["ofa_heads"].modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 5
    for m in convolutions:
        # Torch counts the outputs of all groups.
        fan_out = m.out_channels * m.kernel_size[0] ** 2
        assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


# --- where merging goes, and what is kept


@pytest.mark.parametrize("activated", [[True], [True, False], [True, True, False]])
def test_merged_patches_are_neighbours(activated: list[bool]) -> None:
    """Against a loop over 2x2 cells, in the released order of the corners and with its activations."""
    head = TokenHead(4, 3, 4, len(activated), 5).double()
    feature = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    grid = feature
    for merging, activates in zip(head.merge, activated, strict=True):
        rows = []
        for row in range(0, grid.shape[-2], 2):
            for column in range(0, grid.shape[-1], 2):
                cell = [grid[:, :, row + down, column + right] for right in (0, 1) for down in (0, 1)]
                normed = layer_norm(torch.cat(cell, 1), [4 * grid.shape[1]])
                value = normed @ merging.reduction.weight.T
                rows.append(gelu(value) if activates else value)
        side = grid.shape[-1] // 2
        grid = torch.stack(rows, 2).unflatten(2, (side, side))
    torch.testing.assert_close(head.merge(feature.permute(0, 2, 3, 1)), grid.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("size", "grid", "merges"),
    [(28, 7, [1] * 4), (56, 7, [2] * 4), (32, 7, [1] * 4), (24, 7, [0] * 4), (30, 15, [0] * 4)],
)
def test_grids_are_merged_while_they_stay_as_wide_as_asked(size: int, grid: int, merges: list[int]) -> None:
    heads = ready(vit(8, 4, size=size, patch=2), OFA(grid=grid)).players["ofa_heads"]
    assert [len(head.merge) for head in heads.values()] == merges


def test_a_last_stage_that_is_small_sets_the_aim() -> None:
    heads = ready(swin(), OFA()).players["ofa_heads"]
    assert [len(head.merge) for head in heads.values()] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("blocks", "taps"),
    [(12, (1, 3, 9, 11)), (8, (1, 3, 5, 7)), (24, (1, 3, 21, 23)), (6, (1, 2, 4, 5)), (4, (0, 1, 2, 3))],
)
def test_blocks_of_one_shape_are_tapped_as_released(blocks: int, taps: tuple[int, ...]) -> None:
    term = OFA()
    ready(vit(8, blocks), term)
    assert term.needs.student_stages == taps


def test_taps_can_be_chosen() -> None:
    method = distiller({"ofa": OFA([3, 4], taps=[0, 0])})
    assert method.needs["ofa"].student_stages == (0, 0)
    first = [next(head.parameters()) for head in method.players["ofa_heads"].values()]
    assert [tuple(weight.shape) for weight in first] == [(4, 1, 3, 3), (9, 4, 1, 1)]


# --- the term


def composed(student: Network, teacher: Network, terms: dict[str, Term], size: int | None = None) -> Distiller:
    pixels = student.input_size[1:] if size is None else (size, size)
    data = TensorData({"image": torch.rand(8, student.input_size[0], *pixels), "label": torch.arange(8) % 3})
    return Distiller(teacher, student=student, terms=terms, streams={"train": Stream(data, 4)}).double()


def ready(student: Network, term: OFA, teacher_width: int = 8) -> Distiller:
    channels, classes = student.input_size[0], student.num_classes
    model = SmallConvNet((4, teacher_width), in_channels=channels, num_classes=classes)
    return composed(student, Network(model, input_size=student.input_size), {"ofa": term})


def vit(width: int = 8, blocks: int = 4, size: int = 16, patch: int = 4, classes: int = 3, **more: Any) -> Timm:
    options = {"patch_size": patch, "embed_dim": width, "depth": blocks, "num_heads": 2} | more
    return Timm("vit_tiny_patch16_224", num_classes=classes, input_size=(3, size, size), options=options)


def swin() -> Timm:
    options = {"window_size": 2, "embed_dim": 4, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "patch_size": 2}
    return Timm("swin_tiny_patch4_window7_224", num_classes=3, input_size=(3, 32, 32), options=options)


def mlp(block: str) -> Network:
    """A small Mixer or ResMLP of timm."""
    from timm.models import mlp_mixer

    kind = {"MixerBlock": {}, "ResBlock": {"mlp_ratio": 4, "norm_layer": mlp_mixer.Affine}}[block]
    block_layer = getattr(mlp_mixer, block)
    model = mlp_mixer.MlpMixer(3, 16, patch_size=4, num_blocks=4, embed_dim=8, block_layer=block_layer, **kind)
    return Network(model, [0.5] * 3, [0.5] * 3, (3, 16, 16))


def convnext() -> Timm:
    options = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
    return Timm("convnext_tiny", num_classes=3, input_size=(3, 32, 32), options=options)


def resnet() -> Timm:
    return Timm("test_resnet", num_classes=3, input_size=(3, 32, 32))


PAIRS = {
    "CNN to ViT": (resnet, vit),
    "ViT to CNN": (vit, resnet),
    "Mixer to CNN": (lambda: mlp("MixerBlock"), resnet),
    "ResMLP to CNN": (lambda: mlp("ResBlock"), resnet),
    "ConvNeXt to ResMLP": (convnext, lambda: mlp("ResBlock")),
    "ViT to Swin": (vit, swin),
    "CNN to ViT with registers": (resnet, lambda: vit(reg_tokens=3)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_networks_of_different_kinds_train(pair: str, tmp_path) -> None:
    torch.manual_seed(0)
    teacher, student = (make() for make in PAIRS[pair])
    method = composed(student, teacher, {"ce": CE(), "ofa": OFA(gamma=1.2)}, size=32)
    before = weights(method.players["ofa_heads"])
    play(method, tmp_path / "run", steps=3, proof_window=3)
    assert apart(before, weights(method.players["ofa_heads"])) > 0


@pytest.mark.parametrize("power", [True, False])
def test_the_term_is_the_sum_over_the_heads_and_the_logits(power: bool) -> None:
    gamma = [1.5, 0.7, 1.2]
    method = distiller({"ofa": OFA([3, 4], gamma, temperature=2.0, nontarget_power=power)})
    batch = prepared(method)
    terms, carry = method.student_loss(batch)
    outputs = method.players["student"](batch["train"]["image"], (0, 1))
    heads = method.players["ofa_heads"]
    answers = [heads["3"](outputs.features[0], None), heads["4"](outputs.features[1], None), outputs.logits]
    taught, label = batch["teacher"]["logits"], batch["train"]["label"]
    expected = sum(ofa_loss(own, taught, label, g, 2.0, power) for own, g in zip(answers, gamma, strict=True))
    torch.testing.assert_close(terms, {"ofa": expected})
    assert carry == {}


def test_heads_and_logits_can_be_weighted_apart() -> None:
    whole, apart_ = (
        distiller(terms, weighting=Fixed(weighting))
        for terms, weighting in [
            ({"ofa": OFA([3, 4], 1.3)}, {}),
            ({"kd": OFA([], 1.3), "ofa": OFA([3, 4], 1.3, logits=False)}, {"ofa": 0.5}),
        ]
    )
    apart_.players["ofa_heads"].load_state_dict(whole.players["ofa_heads"].state_dict())
    batch = prepared(whole)
    (total,), parts = whole.student_loss(batch)[0].values(), apart_.student_loss(batch)[0]
    torch.testing.assert_close(parts["kd"] + 2 * parts["ofa"], total)


def test_without_stages_and_with_gamma_1_it_is_distillation_at_temperature_1() -> None:
    ofa, kd = distiller({"term": OFA([])}), distiller({"term": KL(1.0)})
    assert list(ofa.players) == ["student"]
    gradients = []
    for method in (ofa, kd):
        (value,) = method.student_loss(prepared(method))[0].values()
        gradients.append(torch.autograd.grad(value, list(method.players["student"].parameters())))
    torch.testing.assert_close(*gradients)


def test_one_gamma_serves_all() -> None:
    batch, values = prepared(distiller({"ofa": OFA([3, 4])})), []
    for gamma in (1.4, [1.4], [1.4] * 3):
        torch.manual_seed(0)
        values.append(distiller({"ofa": OFA([3, 4], gamma)}).student_loss(batch)[0])
    assert values[0] == values[1] == values[2]


def test_gradients_reach_heads_and_student_but_not_the_teacher() -> None:
    method = distiller({"ofa": OFA([3, 4], logits=False)})
    for parameter in method.frozen.parameters():
        parameter.requires_grad_(True)
    (value,) = method.student_loss(prepared(method))[0].values()
    value.backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(name.startswith("frozen") for name in reached)
    trained = {name for name, _ in method.players.named_parameters(prefix="players")}
    # The student's own classifier learns nothing from heads on its features.
    assert trained - reached == {"players.student.model.head.weight", "players.student.model.head.bias"}


def test_the_product_is_the_student_alone() -> None:
    method = distiller({"ce": CE(), "ofa": OFA([3, 4])})
    assert method.turns()[0].moves == ("student", "ofa_heads")
    assert method.product() is method.players["student"]
    assert method.product().state_dict().keys() == net(4, 5).state_dict().keys()


def test_mixed_labels_count_as_the_larger_class() -> None:
    method = distiller({"ofa": OFA([], 1.5)}, augmentor=Mix(CLASSES))
    batch = prepared(method, step=MIXED)
    assert (batch["train"]["target"] > 0).sum() > 4, "an image has both its classes"
    logits = method.players["student"](batch["train"]["image"]).logits
    label = batch["train"]["target"].argmax(1)
    expected = ofa_loss(logits, batch["teacher"]["logits"], label, 1.5)
    torch.testing.assert_close(method.student_loss(batch)[0]["ofa"], expected)


def test_it_reads_the_head_that_it_is_told() -> None:
    method = distiller({"ce": CE(), "ofa": OFA([], head="second")}, heads=DualHead(hidden=None))
    batch = prepared(method)
    embedding = method.players["student"](batch["train"]["image"], embedding=True).embedding
    logits = method.players["heads_second"](embedding)
    expected = ofa_loss(logits, batch["teacher"]["logits"], batch["train"]["label"])
    torch.testing.assert_close(method.student_loss(batch)[0]["ofa"], expected)


class LogitsOnly(Teacher):
    num_classes = CLASSES

    def targets(self, data: dict) -> dict:
        return {"logits": data["image"].flatten(1)[:, :CLASSES]}


def test_a_teacher_of_logits_alone_will_do() -> None:
    method = distiller({"ofa": OFA([3, 4])}, teacher=LogitsOnly())
    assert method.players["ofa_heads"]["4"].classify.in_features == 5
    assert method.student_loss(prepared(method))[0]["ofa"].isfinite()


@pytest.mark.parametrize("student", [resnet, vit], ids=["convolutions", "tokens"])
def test_half_precision_and_large_features_are_finite(student) -> None:
    torch.manual_seed(0)
    method = ready(student(), OFA(gamma=1.5)).float()
    batch = prepared(method)
    batch["train"]["image"] = batch["train"]["image"].float() * 1e4
    batch["teacher"]["logits"] = batch["teacher"]["logits"].float() * 1e4
    with torch.autocast("cpu", torch.bfloat16):
        (value,) = method.student_loss(batch)[0].values()
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.players.parameters())


def test_the_turn_of_a_token_model_is_one_graph() -> None:
    torch._dynamo.reset()
    method = ready(vit(blocks=1), OFA([4], taps=[0]))
    compiled = torch.compile(method.turns()[0].loss, fullgraph=True, dynamic=False, backend="eager")
    batch = prepared(method)
    torch.testing.assert_close(compiled(batch)[0], method.student_loss(batch)[0])


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": [0]}, "different numbers of 1 to 4"),
        ({"stages": [2, 2]}, "different numbers"),
        ({"stages": [], "logits": False}, "nothing to match"),
        ({"taps": [0]}, "one stage of the network for each"),
        ({"gamma": [1.0, 1.0]}, "or 5: one for each head and the logits"),
        ({"gamma": [1.0] * 5, "logits": False}, "or 4"),
        ({"gamma": 0.0}, "number > 0"),
        ({"kind": "rnn"}, "kind must be"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OFA(**settings)


def unmerged() -> Network:
    """Widens, and keeps its resolution."""
    model = SmallConvNet((4, 8), num_classes=CLASSES)
    model.stages[1][0].stride = (1, 1)
    return Network(model, input_size=(1, 8, 8))


@pytest.mark.parametrize(
    ("student", "term", "message"),
    [
        (
            lambda: net(4, 5),
            OFA(),
            r"'ofa': the student has 2 stages, .* none for \[1, 2\]: choose stages from \[3, 4\]",
        ),
        (lambda: SmallMLP(num_classes=3), OFA(), "'ofa': SmallMLP has no features by stage"),
        (lambda: net(4, 5), OFA([4], taps=[7]), "term 'ofa': SmallConvNet has stages 0 to 1, got stage 7"),
        (lambda: vit(10), OFA(), "do not divide its embedding of 10"),
        (lambda: vit(8, size=30, patch=2), OFA(), "the 15x15 patches of stage 1 cannot be merged .* give grid: 15"),
        (lambda: unmerged(), OFA([3], kind="tokens"), "stage 3 has tokens of 4 and its 8x8 patches are not merged"),
    ],
)
def test_students_that_do_not_fit_are_refused(student, term: OFA, message: str) -> None:
    network = student()
    with pytest.raises(SettingsError, match=message):
        ready(network, term) if isinstance(network, Timm) else distiller({"ofa": term}, student=network)


def test_a_peer_has_no_heads() -> None:
    with pytest.raises(SettingsError, match="reads features"):
        Peer(OFA())


# --- networks as they are used


BIG: Sequence[tuple[str, str, str]] = [
    ("deit_tiny_patch16_224", "resnet18", "resnet18<-deit_tiny(192)_K100"),
    ("resnet50", "deit_tiny_patch16_224", "deit_tiny<-resnet50_K100"),
    ("resnet50", "resmlp_12_224", "resmlp12(384)<-resnet50_K100"),
    ("mixer_s16_224", "resnet18", ""),
    ("convnext_tiny", "resmlp_12_224", "resmlp12(384)<-resnet50_K100"),
    ("swin_tiny_patch4_window7_224", "resnet18", "resnet18<-swin_tiny(768)_K100"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student", "pair"), BIG)
def test_timm_models_at_224_pixels(teacher: str, student: str, pair: str, released) -> None:
    torch.manual_seed(0)
    nets = [Timm(name, num_classes=100) for name in (student, teacher)]
    method = composed(*nets, {"ofa": OFA()}).float()
    if pair:
        expected = released["official_extra_parameter_counts"]["outputs"][pair]["total_extra_params"]
        assert sum(p.numel() for p in method.players["ofa_heads"].parameters()) == expected
    (value,) = method.student_loss(prepared(method))[0].values()
    value.backward()
    assert value.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.players["ofa_heads"].parameters())
