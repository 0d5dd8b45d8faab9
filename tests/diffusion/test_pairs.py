"""Stores of noise and sample: what a teacher made, whole, resumable, and of no other teacher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from small import CLASSES, SHAPE, small_generator
from torch import nn
from torch.utils._pytree import tree_map

from diffusion import pairs as module
from diffusion.conditions import Prompts
from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.pairs import Pairs, store_pairs
from diffusion.process import FlowProcess, VPProcess
from diffusion.samplers import heun

STEPS = 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 8)


def store(folder: Path, count: int = 20, seed: int = 0, **options) -> dict[str, torch.Tensor]:
    teacher = small_generator(**options)
    return Pairs(store_pairs(teacher, count, folder, seed, batch_size=5, steps=STEPS), teacher).columns


def test_a_pair_is_unit_noise_and_what_the_sampler_makes_of_it(tmp_path: Path):
    columns, teacher = store(tmp_path / "pairs"), small_generator()
    assert {name: tuple(column.shape) for name, column in columns.items()} == {
        "noise": (20, *SHAPE),
        "code": (20, *SHAPE),
        "condition.0": (20,),
    }
    assert columns["condition.0"].tolist() == [row % CLASSES for row in range(20)]
    assert columns["noise"].std() == pytest.approx(1.0, abs=0.1)
    noise, labels = columns["noise"], columns["condition.0"]

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return teacher.denoiser(x, t, labels).x0

    with torch.no_grad():
        expected = heun(model, 80 * noise, teacher.process.timesteps(STEPS), teacher.process, prediction_type="x0")
    torch.testing.assert_close(columns["code"], expected)


def test_a_pair_hangs_on_its_number_and_the_seed_alone(tmp_path: Path):
    teacher = small_generator()
    some = Pairs(store_pairs(teacher, 5, tmp_path / "a", batch_size=2, steps=STEPS), teacher).columns
    many = store(tmp_path / "b")
    assert torch.equal(some["noise"], many["noise"][:5])
    torch.testing.assert_close(some["code"], many["code"][:5])
    assert not torch.equal(store(tmp_path / "c", seed=1)["noise"], many["noise"])


def test_the_teachers_guidance_and_the_lack_of_conditions_count(tmp_path: Path):
    plain = store(tmp_path / "a")
    guided = store(tmp_path / "b", guidance_scale=3.0)
    assert torch.equal(plain["noise"], guided["noise"])
    assert not torch.allclose(plain["code"], guided["code"])
    assert set(store(tmp_path / "c", conditional=False)) == {"noise", "code"}


def test_an_interrupted_store_goes_on_and_equals_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = store(tmp_path / "whole")
    plain, blocks = module._block, []

    def dying(generator, rows, *rest):
        blocks.append(rows.start)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return plain(generator, rows, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_block", dying)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path / "cut")
        assert len(Pairs(tmp_path / "cut", small_generator()).columns["noise"]) == 8, "what is there is whole"
        again = store(tmp_path / "cut")
    assert blocks == [0, 8, 8, 16], "finished blocks are not made again"
    for name, column in whole.items():
        assert torch.equal(again[name], column)
    assert not list((tmp_path / "cut").glob(".*")), "nothing unfinished is left"


@pytest.mark.parametrize(("before", "dies_at"), [(0, 2), (0, 3), (10, 0), (10, 1)])
def test_what_the_manifest_names_is_there_and_whole(
    before: int, dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files get their names in turn: a block, the manifest, the next block, the manifest."""
    if before:
        store(tmp_path, before)
    plain, given = os.replace, []

    def dying(source: Path, target: Path) -> None:
        given.append(target)
        if len(given) > dies_at:
            raise KeyboardInterrupt
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path, 20)
    assert len(Pairs(tmp_path, small_generator()).columns["noise"]) == (before or 8)
    assert len(store(tmp_path, 20)["noise"]) == 20


def test_a_store_grows_and_never_shrinks(tmp_path: Path):
    few = store(tmp_path / "pairs", 10)
    more = store(tmp_path / "pairs", 20)
    assert len(more["noise"]) == 20
    assert torch.equal(more["noise"][:10], few["noise"])
    assert len(store(tmp_path / "pairs", 5)["noise"]) == 20
    assert len(list((tmp_path / "pairs").iterdir())) == 4, "three blocks and the manifest"


def test_dropout_is_off_and_modes_stay_as_they_were(tmp_path: Path):
    teacher = small_generator()
    unet = teacher.denoiser.network.network
    unet.mid_block = nn.Sequential(unet.mid_block, nn.Dropout(0.5))
    teacher.train()
    one, other = (Pairs(store_pairs(teacher, 4, tmp_path / n, steps=STEPS), teacher).columns for n in "ab")
    assert torch.equal(one["code"], other["code"])
    assert teacher.training


def test_conditions_of_any_structure_come_back_as_they_were(tmp_path: Path):
    texts = {"encoder_hidden_states": torch.randn(3, 2, 5), "added": {"text_embeds": torch.randn(3, 4)}}
    prompts = Prompts(["a", "b", "c"], texts, tree_map(torch.zeros_like, tree_map(lambda held: held[:1], texts)))

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, t, condition):
            told = condition["encoder_hidden_states"].mean((1, 2)) + condition["added"]["text_embeds"].mean(1)
            return self.scale * x + told.view(-1, 1, 1, 1)

    teacher = Generator(Denoiser(Reading(), FlowProcess(), "velocity"), SHAPE, conditions=prompts)
    held = Pairs(store_pairs(teacher, 7, tmp_path, steps=STEPS), teacher)
    (batch,) = next(held.stream(5).open(0, [(0, 5)], seed=1))
    expected = prompts.at(batch["index"].tolist(), torch.device("cpu"))[0]
    tree_map(torch.testing.assert_close, held.condition(batch), expected)


OTHERS = {
    "weights": {"seed": 1},
    "process": {"process": FlowProcess(), "kind": "velocity"},
    "prediction_type": {"process": VPProcess.from_betas(), "kind": "v"},
    "shape": {"shape": (1, 8, 8)},
    "num_classes": {"conditional": False},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_teachers_pairs_are_refused(what: str, tmp_path: Path):
    first = {"process": VPProcess.from_betas(), "kind": "eps"} if what == "prediction_type" else {}
    store(tmp_path, 3, **first)
    with pytest.raises(ValueError, match=rf"made otherwise.*{what}"):
        Pairs(tmp_path, small_generator(**OTHERS[what]))
    with pytest.raises(ValueError, match=what):
        store_pairs(small_generator(**OTHERS[what]), 3, tmp_path, steps=STEPS)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"steps": 4}, "times"),
        ({"seed": 1, "steps": STEPS}, "seed"),
        ({"guidance_scale": 2.0, "steps": STEPS}, "guidance_scale"),
    ],
)
def test_pairs_made_in_another_way_are_not_mixed_in(options: dict, what: str, tmp_path: Path):
    store(tmp_path, 3)
    guided = {"guidance_scale": options.pop("guidance_scale")} if "guidance_scale" in options else {}
    with pytest.raises(ValueError, match=what):
        store_pairs(small_generator(**guided), 3, tmp_path, **options)


GUIDED = {"guidance_scale": 2.0, "guidance_interval": (0.3, 5.0), "guidance_rescale": 0.7}


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("guidance_scale", 3.0, r"guidance_scale \(2\.0 there, 3\.0 here\)"),
        ("guidance_interval", (0.3, 1.0), r"guidance_interval \(\[0\.3, 5\.0\] there, \[0\.3, 1\.0\] here\)"),
        ("guidance_interval", None, r"guidance_interval \(\[0\.3, 5\.0\] there, None here\)"),
        ("guidance_rescale", 0.0, r"guidance_rescale \(0\.7 there, 0\.0 here\)"),
    ],
)
def test_pairs_of_another_guidance_are_refused(name: str, other: object, told: str, tmp_path: Path):
    held = store(tmp_path, 3, **GUIDED)
    assert not torch.allclose(held["code"], store(tmp_path / "other", 3, **GUIDED | {name: other})["code"], atol=1e-5)
    teacher = small_generator(**GUIDED | {name: other})
    for use in (lambda: Pairs(tmp_path, teacher), lambda: store_pairs(teacher, 5, tmp_path, steps=STEPS)):
        with pytest.raises(ValueError, match=rf"made otherwise: {told} differs.*another folder, or .* guidance"):
            use()


def test_stores_from_before_guidance_was_rescaled_are_still_taken(tmp_path: Path):
    store(tmp_path, 3, guidance_scale=2.0)
    manifest = json.loads((tmp_path / "pairs.json").read_text())
    del manifest["made"]["guidance_interval"], manifest["made"]["guidance_rescale"]
    (tmp_path / "pairs.json").write_text(json.dumps(manifest))
    assert len(Pairs(tmp_path, small_generator(guidance_scale=2.0)).columns["noise"]) == 3
    with pytest.raises(ValueError, match=r"guidance_scale \(2\.0 there, 1\.0 here\)"):
        Pairs(tmp_path, small_generator())
    with pytest.raises(ValueError, match=r"guidance_rescale \(0\.0 there, 0\.5 here\)"):
        Pairs(tmp_path, small_generator(guidance_scale=2.0, guidance_rescale=0.5))


@pytest.mark.parametrize("damage", ["change", "delete"])
def test_damaged_files_are_refused(damage: str, tmp_path: Path):
    store(tmp_path, 10)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink() if damage == "delete" else file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"{file.name} is missing or damaged"):
        Pairs(tmp_path, small_generator())


def test_what_cannot_be_paired_is_refused(tmp_path: Path):
    student = small_generator(sampler="student", steps=2)
    with pytest.raises(ValueError, match="without noise of its own"):
        store_pairs(student, 3, tmp_path / "a")
    store_pairs(student, 3, tmp_path / "b", steps=1)
    with pytest.raises(ValueError, match="got 0"):
        store_pairs(small_generator(), 0, tmp_path / "c")
    with pytest.raises(ValueError, match="holds no pairs"):
        Pairs(tmp_path / "nowhere", small_generator())


def test_the_manifest_says_who_made_them_and_how(tmp_path: Path):
    store(tmp_path, 10)
    made = json.loads((tmp_path / "pairs.json").read_text())["made"]
    assert (made["sampler"], made["seed"], made["shape"]) == ("heun", 0, list(SHAPE))
    assert made["times"] == pytest.approx(small_generator().times(STEPS).tolist())


def test_the_stream_gives_pairs_as_they_belong_together(tmp_path: Path):
    teacher = small_generator()
    held = Pairs(store_pairs(teacher, 20, tmp_path, steps=STEPS), teacher)
    (batch,) = next(held.stream(6).open(3, [(0, 6)], seed=1))
    for name, column in held.columns.items():
        assert torch.equal(batch[name], column[batch["index"]])
    assert torch.equal(held.condition(batch), batch["index"] % CLASSES)
