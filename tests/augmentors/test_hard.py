"""Hard augmentations: what the edits can do, who moves in whose turn, when the search pauses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilling import CLASSES, apart, images, net, play, prepared, weights
from torch import Tensor, nn

from visiondistill import Distiller
from visiondistill.augmentors import Affine, AffineRange, Chain, Edit, Hard, Mask, draw_edits
from visiondistill.augmentors.edits import MOVES, Moves, moved_by
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Draw
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import key
from visiondistill.losses import kd_loss
from visiondistill.models import Network
from visiondistill.teachers import Teacher
from visiondistill.terms import CE, DKD, KL
from visiondistill.weighting import Trilateral

CLEAN, HARD = slice(0, None, 2), slice(1, None, 2)
"""Rows that stay as they are, and rows that are edited, where nothing else is said."""
EDITS: dict[str, Callable[[], Edit]] = {
    "affine": lambda: Affine(channels=1, width=4),
    "range": AffineRange,
    "mask": lambda: Mask(channels=1, width=4, cells=4),
}


def method(edit: str = "affine", student: Network | None = None, teacher: object = None, **settings) -> Distiller:
    torch.manual_seed(0)
    return Distiller(
        teacher=teacher or net(6, 9, seed=5),
        student=student or net(4, 5),
        terms={"ce": CE(), "kd": KL(2.0)},
        augmentor=Hard(EDITS[edit](), **settings),
        streams={"train": Stream(images(), 4)},
    ).double()


def unsettled(edit: nn.Module, size: float = 0.5) -> nn.Module:
    """Weights that do something, in place of the zeros of the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in edit.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return edit


def pictures(count: int = 6, side: int = 20) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise_for(edit: Edit, image: Tensor, seed: int = 0) -> Tensor:
    return edit.noise(image, Draw(seed, 0, {"": (0, len(image))}, 1, image.device, image.dtype), "test")


# --- edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EDITS)
def test_at_first_an_edit_changes_nothing(name: str, dtype: torch.dtype) -> None:
    edit, image = EDITS[name]().to(dtype), pictures().to(dtype)
    edited, share = edit(image, noise_for(edit, image), image.flip(0))
    assert (edited - image).abs().max() < 1e-6
    assert torch.equal(share, torch.ones(6, dtype=dtype))


@pytest.mark.parametrize("name", EDITS)
def test_an_answer_depends_on_the_noise_and_stays_in_range(name: str) -> None:
    edit, image = unsettled(EDITS[name]().double()), pictures()
    first, second = (edit(image, noise_for(edit, image, seed), image.flip(0))[0] for seed in (0, 1))
    assert not torch.allclose(first, second)
    for edited in (first, second):
        assert edited.min() >= 0
        assert edited.max() <= 1


@pytest.mark.parametrize("name", ["affine", "range"])
def test_moves_stay_within_their_bounds(name: str) -> None:
    kind = Affine if name == "affine" else AffineRange
    bounds = {"turn": 20.0, "translation": 0.1, "scale": 1.5, "shear": 5.0}
    edit = unsettled(kind(**bounds, **({"channels": 1} if name == "affine" else {})).double(), 100.0)
    image = pictures(64)
    numbers = edit.numbers(image, noise_for(edit, image), image)
    assert numbers.abs().max() <= 1
    assert numbers.abs().max() > 0.9
    extreme = Moves(**bounds).double()(torch.eye(6, dtype=torch.float64))
    turn, right, down, wide, high, shear = extreme
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    assert torch.atan2(turn[1, 0], turn[0, 0]).rad2deg().item() == pytest.approx(20)
    torch.testing.assert_close(right - still, torch.tensor([[0, 0, -0.2], [0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(down - still, torch.tensor([[0, 0, 0], [0, 0, -0.2]], dtype=torch.float64))
    torch.testing.assert_close(wide, still * torch.tensor([[1 / 1.5, 1, 1]]).double())
    torch.testing.assert_close(high, still * torch.tensor([[1, 1 / 1.5, 1]]).double())
    assert shear[0, 1].atan().rad2deg().item() == pytest.approx(5)


def test_a_bound_of_0_leaves_its_move_out() -> None:
    edit = unsettled(AffineRange(turn=0, translation=0.2, scale=1, shear=0).double())
    image = pictures(8)
    maps = edit.moves(edit.numbers(image, noise_for(edit, image), image))
    torch.testing.assert_close(maps[:, :, :2], torch.eye(2, dtype=torch.float64).expand(8, 2, 2))
    assert maps[:, :, 2].abs().min() > 0


def test_an_image_moves_to_the_right_and_down_by_whole_pixels() -> None:
    image = pictures(1)
    maps = Moves(0, 0.1, 1, 0).double()(torch.tensor([[0, 1, 0.5, 0, 0, 0]], dtype=torch.float64))
    moved = moved_by(image, maps)
    torch.testing.assert_close(moved[..., 1:, 2:], image[..., :-1, :-2])


def test_an_oblong_image_is_turned_not_sheared() -> None:
    image = torch.zeros(1, 1, 9, 19, dtype=torch.float64)
    image[..., 4, 7:12] = 1
    quarter = Moves(90, 0, 1, 0).double()(torch.eye(6, dtype=torch.float64)[:1])
    turned = moved_by(image, quarter)
    expected = torch.zeros_like(image)
    expected[..., 2:7, 9] = 1
    # Further out lie reflections.
    torch.testing.assert_close(turned[..., 5:14], expected[..., 5:14])


def test_ranges_are_sampled_evenly_and_reach_what_they_say() -> None:
    edit = AffineRange(translation=0.3).double()
    with torch.no_grad():
        edit.width[1:3] = torch.tensor([0.5, -2.0])
    image = pictures(4000, 1)
    numbers = edit.numbers(image, noise_for(edit, image), image)
    reach = torch.tensor([edit.reach()[move] for move in MOVES], dtype=torch.float64)
    torch.testing.assert_close(reach[1:3], torch.tensor([0.5, 2.0]).double().tanh())
    assert not numbers[:, [0, 3, 4, 5]].any()
    for column, most in ((1, reach[1]), (2, reach[2])):
        quarters = (numbers[:, column] / most * 2).floor().long() + 2
        assert quarters.bincount(minlength=4).min() > 850


def test_ranges_start_as_wide_as_they_are_told() -> None:
    for start in (0.0, 0.3, 0.95):
        assert AffineRange(start=start).reach() == pytest.approx(dict.fromkeys(MOVES, start), abs=1e-6)
    for start in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"need start in \[0, 1\)"):
            AffineRange(start=start)


def test_a_mask_takes_the_partners_pixels_and_says_how_much() -> None:
    edit = Mask(most=0.5, channels=1, width=4, cells=4).double()
    with torch.no_grad():
        edit.net[-1].bias.fill_(0.3)
    image, partner = pictures(), pictures().flip(0)
    edited, share = edit(image, noise_for(edit, image), partner)
    torch.testing.assert_close(edited, 0.7 * image + 0.3 * partner)
    torch.testing.assert_close(share, torch.full((6,), 0.7, dtype=torch.float64))
    with torch.no_grad():
        edit.net[-1].bias.fill_(9.0)
    assert edit(image, noise_for(edit, image), partner)[1].tolist() == pytest.approx([0.5] * 6)


def test_a_mask_comes_back_from_0() -> None:
    edit = Mask(channels=1, width=4, cells=4).double()
    with torch.no_grad():
        edit.net[-1].bias.fill_(-0.2)
    image = pictures()
    edited, _ = edit(image, noise_for(edit, image), image.flip(0))
    assert torch.equal(edited, image)
    ((edited - image.flip(0)) ** 2).mean().backward()
    assert edit.net[-1].bias.grad < 0, "more of the partner would be better"


# --- the student's batch


def test_every_second_image_is_edited_and_the_teacher_sees_it() -> None:
    distiller = method()
    unsettled(distiller.players["augmentor"])
    batch, stream = prepared(distiller), distiller.streams["train"]
    original = next(stream.open(0, [(0, 4)], key(0, "train")))[0]
    seen = batch["train"]["image"]
    assert torch.equal(seen[CLEAN], original["image"][CLEAN])
    assert all((seen[row] - original["image"][row]).abs().max() > 1e-3 for row in (1, 3))
    assert torch.equal(batch["train"]["label"], original["label"])
    torch.testing.assert_close(batch["teacher"]["logits"], distiller.parts["teacher"](seen))
    assert not seen.requires_grad


@pytest.mark.parametrize(
    ("share", "hard"), [(0.25, [3]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (0.3, [3, 6, 9])]
)
def test_edited_rows_are_spread_evenly_and_alike_in_every_split(share: float, hard: list[int]) -> None:
    part, count = Hard(AffineRange(), share=share, upper=None), 10 if share == 0.3 else 4
    edited, clean = (rows.tolist() for rows in part.rows(count, torch.device("cpu")))
    assert edited == hard
    assert sorted(edited + clean) == list(range(count))
    twice = part.rows(2 * count, torch.device("cpu"))
    assert [rows.tolist() for rows in twice] == [own + [row + count for row in own] for own in (edited, clean)], (
        "two micro-batches in one"
    )


def test_every_image_can_be_edited_and_then_the_switch_has_nothing_to_compare(tmp_path: Path) -> None:
    distiller = method("mask", share=1.0, upper=None)
    nn.init.constant_(distiller.players["augmentor"].net[-1].bias, 0.25)
    original = next(distiller.streams["train"].open(0, [(0, 4)], key(0, "train")))[0]
    batch = prepared(distiller)
    neighbour = torch.tensor([1, 0, 3, 2])
    mixed = 0.75 * original["image"] + 0.25 * original["image"][neighbour]
    torch.testing.assert_close(batch["train"]["image"], mixed)
    hot = torch.nn.functional.one_hot(original["label"], CLASSES).double()
    torch.testing.assert_close(batch["train"]["target"], 0.75 * hot + 0.25 * hot[neighbour])
    assert len(batch["hard"]["image"]) == 4, "the search is on every image, too"
    assert not any("augmentor" in name for name in distiller.student_loss(batch)[1])
    assert play(distiller, tmp_path, proof_window=3).proofs["main"].declined == []


def test_nothing_is_edited_in_the_warmup() -> None:
    distiller = method(warmup=3)
    unsettled(distiller.players["augmentor"])
    for step, edited in ((2, False), (3, True)):
        original = next(distiller.streams["train"].open(step, [(0, 4)], key(0, "train")))[0]
        seen = prepared(distiller, step)["train"]["image"]
        assert torch.equal(seen, original["image"]) is not edited
    assert [turn.start for turn in distiller.turns()] == [0, 3]


def test_a_mask_mixes_the_labels_too() -> None:
    distiller = method("mask")
    with torch.no_grad():
        distiller.players["augmentor"].net[-1].bias.fill_(0.25)
    label = next(distiller.streams["train"].open(0, [(0, 4)], key(0, "train")))[0]["label"]
    batch = prepared(distiller)
    hot = torch.nn.functional.one_hot(label, CLASSES).double()
    expected = hot.clone()
    expected[1::2] = 0.75 * hot[1::2] + 0.25 * hot[::2]
    torch.testing.assert_close(batch["train"]["target"], expected)
    assert "label" not in batch["train"]


def test_a_mask_mixes_images_without_labels() -> None:
    stream = Stream(TensorData({"image": images().columns["image"]}), 4)
    parts = {"student": net(4, 5), "augmentor": Hard(EDITS["mask"]())}
    distiller = Distiller(net(6, 9), **parts, terms={"kd": KL()}, streams={"train": stream})
    assert not prepared(distiller.double())["train"]["target"].any()


# --- its turn


def ready(distiller: Distiller) -> dict:
    unsettled(distiller.players["augmentor"], 0.2)
    distiller.eval()
    return prepared(distiller)


@pytest.mark.parametrize("name", EDITS)
def test_a_small_step_makes_the_batch_harder(name: str) -> None:
    distiller = method(name)
    batch, edit = ready(distiller), distiller.players["augmentor"]
    if name == "mask":  # at its ends the gradient is not the slope
        nn.init.constant_(edit.net[-1].weight, 0.01)
        nn.init.constant_(edit.net[-1].bias, 0.25)
    before = distiller.parts["augmentor"].search_loss(batch)[0]["disagreement"]
    parameters = list(edit.parameters())
    gradients = torch.autograd.grad(before, parameters)
    size = torch.stack([g.square().sum() for g in gradients]).sum()
    assert size > 0
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(1e-6 / size.sqrt() * gradient)
    after = distiller.parts["augmentor"].search_loss(batch)[0]["disagreement"]
    assert after < before
    torch.testing.assert_close(after - before, -1e-6 * size.sqrt(), rtol=0.05, atol=0)


def test_its_terms_are_the_cards() -> None:
    distiller = method(stability=0.5, temperature=3.0)
    batch, augmentor = ready(distiller), distiller.parts["augmentor"]
    given = batch["hard"]
    hard, _ = augmentor.edit(given["image"], given["noise"], given["partner"])
    student, teacher = distiller.players["student"], distiller.frozen["teacher"]
    terms, carry = augmentor.search_loss(batch)
    expected = {
        "disagreement": -kd_loss(student(hard).logits, teacher(hard).logits, 3.0),
        "stability": 0.5 * kd_loss(teacher(hard).logits, teacher(given["image"]).logits, 3.0),
    }
    torch.testing.assert_close(terms, expected, rtol=1e-9, atol=0)
    assert carry["skip"] < 0
    edit = list(augmentor.edit.parameters())
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, edit, retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected[name], edit, retain_graph=True))
        assert max(gradient.abs().max() for gradient in gradients) > 0


@pytest.mark.parametrize("name", EDITS)
def test_diversity_is_how_much_answers_to_one_image_differ(name: str) -> None:
    distiller = method(name, diversity=2.0)
    batch, edit = ready(distiller), distiller.players["augmentor"]
    if name == "mask":
        nn.init.constant_(edit.net[-1].bias, 0.25)
    given = batch["hard"]
    one, other = (edit.numbers(given["image"], given[n], given["partner"]) for n in ("noise", "other_noise"))
    term = distiller.parts["augmentor"].search_loss(batch)[0]["diversity"]
    torch.testing.assert_close(term, -2 * (one - other).abs().mean())
    assert term < 0
    same = batch | {"hard": given | {"other_noise": given["noise"]}}
    assert distiller.parts["augmentor"].search_loss(same)[0]["diversity"] == 0


def test_diversity_widens_ranges() -> None:
    distiller = method("range", diversity=1.0)
    batch, width = ready(distiller), distiller.players["augmentor"].width
    with torch.no_grad():
        width.copy_(torch.tensor([0.1, 0.2, 0.3, -0.1, -0.2, 1.0]))
    (gradient,) = torch.autograd.grad(distiller.parts["augmentor"].search_loss(batch)[0]["diversity"], width)
    assert (gradient * width < 0).all()


def test_the_gradient_is_0_where_student_and_teacher_are_one() -> None:
    distiller = method(student=net(6, 9, seed=5))
    terms, _ = distiller.parts["augmentor"].search_loss(ready(distiller))
    gradients = torch.autograd.grad(terms["disagreement"], list(distiller.players["augmentor"].parameters()))
    assert all(gradient.abs().max() < 1e-15 for gradient in gradients)


def test_the_gradient_goes_through_both_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = method()
    batch = ready(distiller)
    edit = list(distiller.players["augmentor"].parameters())

    def gradient() -> Tensor:
        terms, _ = distiller.parts["augmentor"].search_loss(batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(terms["disagreement"], edit)])

    through_both = gradient()
    teacher = distiller.parts["teacher"]
    targets = type(teacher).targets
    monkeypatch.setattr(type(teacher), "targets", lambda self, data: {"logits": targets(self, data)["logits"].detach()})
    assert (gradient() - through_both).abs().max() > 1e-3 * through_both.abs().max()


@pytest.mark.parametrize("name", EDITS)
def test_each_turn_moves_its_own_player_and_no_statistics(name: str, tmp_path: Path) -> None:
    moved: dict[str, set[str]] = {"student": set(), "augmentor": set()}
    distiller = method(name, student=net(4, 5, norm="batch"), stability=0.1, upper=1e9)
    networks = {**distiller.players, "teacher": distiller.frozen["teacher"]}
    known = {who: weights(network) for who, network in networks.items()}
    after = type(distiller).after

    def watch(self: Distiller, turn: str, carry: dict) -> dict:
        for who, network in networks.items():
            if apart(known[who], now := weights(network)):
                moved[turn].add(who)
            known[who] = now
        return after(self, turn, carry)

    distiller.__class__ = type("Distiller", (Distiller,), {"after": watch})
    result = play(distiller, tmp_path)
    assert moved == {"student": {"student"}, "augmentor": {"augmentor"}}
    assert result.product is distiller.players["student"]


# --- the switch


def switched(upper: float | None, lower: float, *looks: tuple[float, float]) -> list[bool]:
    """Whether it searches after each look at (clean, edited) disagreement; the running mean follows at once."""
    part = Hard(AffineRange(), upper=upper, lower=lower, momentum=0.0)
    answers = []
    for clean, hard in looks:
        writes = part.after("student", {"clean": torch.tensor(clean), "hard": torch.tensor(hard)})
        for name, value in writes.items():
            getattr(part, name).copy_(value)
        answers.append(bool(part.searching))
    return answers


def test_it_pauses_above_the_upper_threshold_and_resumes_below_the_lower_one() -> None:
    looks = [(1.0, 1.9), (1.0, 2.1), (1.0, 1.5), (1.0, 1.1), (1.0, 1.5), (2.0, 4.1), (2.0, 2.3)]
    assert switched(2.0, 1.2, *looks) == [True, False, False, True, True, False, True]


def test_without_an_upper_threshold_it_never_pauses() -> None:
    assert switched(None, 1.2, (1.0, 1e30), (1e-8, 1.0)) == [True, True]


def test_the_clean_loss_is_a_running_mean_that_starts_at_the_first() -> None:
    part = Hard(AffineRange(), momentum=0.75)
    for clean, expected in ((2.0, 2.0), (4.0, 2.5)):
        writes = part.after("student", {"clean": torch.tensor(clean), "hard": torch.tensor(1.0)})
        part.clean.copy_(writes["clean"])
        assert part.clean.item() == pytest.approx(expected)
    assert part.after("augmentor", {}) == {}


def test_the_student_turn_tells_both_losses() -> None:
    distiller = method()
    batch = ready(distiller)
    _, carry = distiller.student_loss(batch)
    each = kd_loss(
        distiller.players["student"](batch["train"]["image"]).logits, batch["teacher"]["logits"], 4.0, "none"
    )
    torch.testing.assert_close(carry["augmentor.clean"], each[CLEAN].mean())
    torch.testing.assert_close(carry["augmentor.hard"], each[HARD].mean())


@pytest.mark.parametrize(("upper", "moves"), [(1e9, True), (1e-9, False)])
def test_a_paused_search_leaves_the_edit_as_it_is(upper: float, moves: bool, tmp_path: Path) -> None:
    distiller = method(upper=upper, lower=min(upper, 1.0))
    before = weights(distiller.players["augmentor"])
    result = play(distiller, tmp_path, proof_window=3)
    assert (apart(before, weights(distiller.players["augmentor"])) > 0) is moves
    assert result.proofs["main"].declined == ([] if moves else ["augmentor"])


# --- in a run


@pytest.mark.parametrize("name", EDITS)
def test_it_resumes_to_the_bit_and_is_one_graph(name: str, tmp_path: Path) -> None:
    def made() -> Distiller:
        return method(name, student=net(4, 5, norm="batch"), stability=0.1, warmup=1, upper=1.05, lower=0.9)

    whole, again, compiled = made(), made(), made()
    unsettled(again.players["augmentor"])
    play(whole, tmp_path / "whole", checkpoint_every=3, keep=9, proof_window=3)
    play(again, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoints" / "step_000000003"), proof_window=3)
    assert apart(weights(whole), weights(again)) == 0
    play(compiled, tmp_path / "compiled", compile=True, compile_backend="eager", proof_window=3)
    assert apart(weights(whole), weights(compiled)) < 1e-12


def test_the_upper_gradient_sees_edited_images() -> None:
    """Of a weighting that differentiates through the student's turn."""
    streams = {"train": Stream(images(), 4), "val": Stream(images(), 6)}
    parts = {"weighting": Trilateral(), "augmentor": Hard(EDITS["mask"]())}
    build = {"teacher": net(6, 9, seed=5), "student": net(4, 5), "terms": {"ce": CE(), "kd": KL(2.0)}}
    distiller = Distiller(**build, **parts, streams=streams).double()
    distiller.setup(distiller.streams)
    unsettled(distiller.players["augmentor"], 0.3)
    batch = prepared(distiller) | {"val": next(distiller.streams["val"].open(0, [(0, 6)], 3))[0]}
    weighting = distiller.parts["weighting"]
    before = weighting.fusion_loss(batch)[0]["val"]
    plain = batch["train"]["image"].clone()
    plain[HARD] = batch["hard"]["image"]
    assert weighting.fusion_loss(batch | {"train": batch["train"] | {"image": plain}})[0]["val"] != before


def test_a_picture_shows_images_and_edits(tmp_path: Path) -> None:
    edit = unsettled(AffineRange().double())
    draw_edits(edit, pictures(4), tmp_path / "edits.png")
    from PIL import Image

    with Image.open(tmp_path / "edits.png") as picture:
        assert picture.size[0] > 100
        assert len(set(picture.convert("L").tobytes())) > 50


@pytest.mark.parametrize("channels", [2, 3])
def test_it_draws_its_edits_of_any_number_of_channels(channels: int, tmp_path: Path) -> None:
    Hard(AffineRange()).draw(pictures(4).float().expand(-1, channels, -1, -1), tmp_path)
    assert (tmp_path / "edits.png").stat().st_size > 1000


class Stored(Teacher):
    """Knows its answers by heart."""

    num_classes = CLASSES

    def targets(self, data: dict) -> dict:
        return {"logits": torch.zeros(len(data["image"]), CLASSES).double()}


def test_what_cannot_be_is_refused() -> None:
    build = {"student": net(4, 5), "streams": {"train": Stream(images(), 4)}}
    with pytest.raises(SettingsError, match="Stored has no network"):
        method(teacher=Stored())
    with pytest.raises(SettingsError, match="'augmentor' reads a teacher, but there is none"):
        Distiller(**build, terms={"ce": CE()}, augmentor=Hard(AffineRange()))
    with pytest.raises(SettingsError, match="mixes images and their labels"):
        Distiller(net(6, 9), **build, terms={"dkd": DKD()}, augmentor=Hard(Mask(channels=1)))
    with pytest.raises(SettingsError, match="stand alone"):
        Chain([Hard(AffineRange())])
    odd = build | {"streams": {"train": Stream(images(), 3)}}
    distiller = Distiller(net(6, 9), **odd, terms={"kd": KL()}, augmentor=Hard(AffineRange()))
    with pytest.raises(SettingsError, match="is even"):
        prepared(distiller)
    with pytest.raises(SettingsError, match=r"5 of 6 rows of a micro-batch .* it has 4: .* divisible by 6"):
        prepared(method(share=5 / 6))
    colours = method()
    colours.parts["augmentor"].players[""] = Affine()
    with pytest.raises(SettingsError, match="Affine is for images of 3 channels, these have 1: set channels: 1"):
        prepared(colours)
    with pytest.raises(SettingsError, match=r"upper=2.0 compares .* share=1.0 leaves none: set upper to null"):
        method(share=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"share": 1e-4},
        {"upper": 1.0},
        {"lower": 0.0},
        {"stability": -1.0},
        {"diversity": -1.0},
        {"warmup": -1},
        {"momentum": 1.0},
    ],
)
def test_numbers_outside_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(SettingsError, match="need"):
        Hard(AffineRange(), **wrong)
    with pytest.raises(ValueError, match="need turn"):
        AffineRange(turn=181.0)
    with pytest.raises(ValueError, match="need most"):
        Mask(most=0.0)
