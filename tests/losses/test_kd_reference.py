"""Values and gradients against what official code produced (`reference_values/kd`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from visiondistill import losses
from visiondistill.losses import standardize_logits

Inputs = dict[str, Tensor]
Call = Callable[[Tensor, Inputs, dict[str, Any]], Tensor]

FILES: dict[str, Call] = {
    "kd_hinton": lambda s, i, h: losses.kd_loss(s, i["teacher_logits"], h["temperature"]),
    "dkd": lambda s, i, h: losses.dkd_loss(
        s, i["teacher_logits"], i["labels"], h["alpha"], h["beta"], h["temperature"]
    ),
    "dist": lambda s, i, h: losses.dist_loss(s, i["teacher_logits"], h["beta"], h["gamma"], h["tau"]),
    "lskd_kd": lambda s, i, h: losses.kd_loss(
        standardize_logits(s), standardize_logits(i["teacher_logits"]), h["temperature"]
    ),
    "lskd_dkd": lambda s, i, h: losses.dkd_loss(
        standardize_logits(s),
        standardize_logits(i["teacher_logits"]),
        i["labels"],
        h["alpha"],
        h["beta"],
        h["temperature"],
    ),
    "ofa_loss": lambda s, i, h: losses.ofa_loss(s, i["teacher_logits"], i["labels"], h["eps"], h["temperature"]),
    "dhkd_binary_kl": lambda s, i, h: losses.binary_kl_loss(s, i["teacher_logits"], h["temperature"]),
    "dhkd_binary_kl_norm": lambda s, i, h: losses.binary_kl_norm_loss(s, i["teacher_logits"], h["temperature"]),
    "nd_loss": lambda s, i, h: h["nd_loss_factor"] * losses.nd_loss(s, i["teacher_emb"], i["class_means"], i["labels"]),
    "pld": lambda s, i, h: losses.pld_loss(s, i["teacher_logits"], i["labels"], h["temperature"]),
    "at": lambda s, i, h: losses.attention_transfer_loss(s, i["teacher_feat"], h["p"]),
    "rkd": lambda s, i, h: losses.rkd_loss(s, i["teacher_feat"], h["distance_weight"], h["angle_weight"]),
    "sinkd": lambda s, i, h: (
        h["weight"] * losses.sinkhorn_loss(s, i["teacher_logits"], h["T_effective"], h["epsilon"], h["n_iters"])
    ),
}
STUDENT = {"nd_loss": "student_emb", "at": "student_feat", "rkd": "student_feat"}
"""Name of the student's input, where it is not its logits."""
CLAMPED = ("large_scale", "nonfinite")
"""Cases in which the released code's clamp or log(0) shows: there we only have to be finite."""
CLAMPING = ("dhkd_binary_kl", "dhkd_binary_kl_norm", "ofa_loss")


def cases_of(name: str, shared_dir) -> list[dict]:
    cases = torch.load(shared_dir / "reference_values" / "kd" / f"{name}.pt", weights_only=True)["cases"]
    assert cases
    return cases


@pytest.mark.parametrize("name", FILES)
def test_value_and_gradient_equal_official_code(name, shared_dir):
    own = STUDENT.get(name, "student_logits")
    for case in cases_of(name, shared_dir):
        student = case["inputs"][own].clone().requires_grad_()
        loss = FILES[name](student, case["inputs"], case["hyper"])
        (gradient,) = torch.autograd.grad(loss, student)
        if name in CLAMPING and any(word in case["name"] for word in CLAMPED):
            assert loss.isfinite(), case["name"]
            assert gradient.isfinite().all(), case["name"]
            continue
        # At student = teacher the reference itself is rounding noise, hence the absolute tolerance.
        # Clamps of the released code shift values in the eighth digit.
        rtol = 1e-6 if name in CLAMPING else 1e-9
        atol = 1e-7 if name in CLAMPING else 1e-10
        torch.testing.assert_close(loss, case["outputs"]["loss"], rtol=rtol, atol=atol, msg=case["name"])
        torch.testing.assert_close(
            gradient,
            case["grads"][own],
            rtol=rtol,
            atol=atol,
            msg=lambda m, c=case: f"{c['name']}: {m}",
        )


def test_taid_equals_official_code(shared_dir):
    compared = 0
    for case in cases_of("taid", shared_dir):
        if not case["name"].startswith("loss"):
            continue
        inputs = case["inputs"]
        student = inputs["student_logits"].clone().requires_grad_()
        values = losses.taid_loss(student, inputs["teacher_logits"], case["hyper"]["t"], reduction="none")
        mask = inputs["mask"].to(values.dtype)
        loss = (values * mask).sum() / mask.sum()
        (gradient,) = torch.autograd.grad(loss, student)
        # The released code casts to float32 inside.
        torch.testing.assert_close(loss.float(), case["outputs"]["loss"].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradient.float(), case["grads"]["student_logits"].float(), rtol=1e-5, atol=1e-6, msg=case["name"]
        )
        compared += 1
    assert compared >= 4
