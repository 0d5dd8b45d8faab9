"""Whose weights are whose in DMD2, and in which precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import CLASSES, ROWS, play, small_generator, weights

from diffusion.critics import GAN
from diffusion.methods.dmd2 import DMD2
from diffusion.models import UNet2D, lora
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Draw


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ({"student": "teacher"}, r"the student has weights of the teacher.*`student: null`"),
        ({"fake_score": "teacher"}, r"the fake_score has weights of the teacher.*`fake_score: null`"),
        ({"student": "other", "fake_score": "other"}, r"the fake_score has weights of the student"),
    ],
)
def test_no_weights_have_two_roles(roles: dict[str, str], told: str):
    given = {"teacher": small_generator(), "other": small_generator(seed=1)}
    with pytest.raises(ValueError, match=told):
        DMD2(given["teacher"], **{role: given[name] for role, name in roles.items()})
    given["teacher"].requires_grad_(False)  # as another method's teacher is
    with pytest.raises(ValueError, match=told):
        DMD2(given["teacher"], **{role: given[name] for role, name in roles.items()})


def test_adapters_stand_on_the_teachers_own_weights():
    teacher = UNet2D((1, 8, 8), block_out_channels=(16, 16))
    student = lora(teacher, rank=2, target_modules=["conv1"])
    m = DMD2(teacher, student=student)
    assert m.product() is student.denoiser
    shared = {id(p) for p in teacher.denoiser.parameters()} & {id(p) for p in student.denoiser.parameters()}
    assert shared
    assert not any(p.requires_grad for p in student.denoiser.parameters() if id(p) in shared)


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_a_teacher_in_half_precision_is_one_copy_and_players_keep_theirs(features: str, tmp_path: Path):
    torch.manual_seed(0)
    teacher = UNet2D((1, 8, 8), CLASSES, block_out_channels=(16, 16))
    image = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    streams = {"train": Stream(TensorData({"image": image, "label": torch.arange(16) % CLASSES}), ROWS)}
    options = {"guidance_scale": 2.0, "streams": streams, "gan": GAN(features=features)}
    exact, half = (DMD2(teacher, teacher_precision=name, **options) for name in ("own", "bf16"))
    assert exact.teacher is teacher
    assert {p.dtype for p in half.frozen.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.players.parameters()} == {torch.float32}
    assert torch.equal(weights(half.product()), weights(exact.product())), "copies of the original"
    assert half.generator().denoiser is half.product()
    assert not any(part is teacher or part is teacher.denoiser for part in half.modules()), "the original stays behind"
    draws = Draw(0, 0, {"": (0, ROWS), "train": (0, ROWS)}, ROWS, torch.device("cpu"), torch.float32)
    fields = []
    for m in (exact, half):
        batch = {"train": next(streams["train"].open(0, [(0, ROWS)], 0))[0]}
        with torch.no_grad():
            batch = m.prepare(batch, draws, frozenset({"student", "critic"}))
        terms, carry = m.student_loss(batch)
        terms |= {f"critic {name}": term for name, term in m.critic_loss(batch | carry)[0].items()}
        assert {term.dtype for term in terms.values()} == {torch.float32}
        fields.append(torch.autograd.grad(terms["dmd"], list(m.product().parameters()), allow_unused=True))
    differences = [(a - b).norm() / a.norm().clamp(min=1e-6) for a, b in zip(*fields, strict=True) if a is not None]
    assert 0 < max(differences) < 0.2
    play(half, tmp_path, 2)


def test_networks_that_may_not_convert_what_they_are_given_keep_their_precision():
    with pytest.raises(ValueError, match="SmallUNet is no network of diffusers"):
        DMD2(small_generator(), teacher_precision="bf16")
    with pytest.raises(ValueError, match="teacher_precision"):
        DMD2(small_generator(), teacher_precision="half")
