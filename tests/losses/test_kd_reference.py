"""Values and gradients against what official code produced (`reference_values/kd`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from visiondistill.losses import dist_loss, dkd_loss, kd_loss, standardize_logits

FILES: dict[str, Callable] = {
    "kd_hinton": lambda s, t, y, h: kd_loss(s, t, temperature=h["temperature"]),
    "dkd": lambda s, t, y, h: dkd_loss(s, t, y, h["alpha"], h["beta"], h["temperature"]),
    "dist": lambda s, t, y, h: dist_loss(s, t, h["beta"], h["gamma"], h["tau"]),
    "lskd_kd": lambda s, t, y, h: kd_loss(standardize_logits(s), standardize_logits(t), h["temperature"]),
    "lskd_dkd": lambda s, t, y, h: dkd_loss(
        standardize_logits(s), standardize_logits(t), y, h["alpha"], h["beta"], h["temperature"]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_value_and_gradient_equal_official_code(name, shared_dir):
    cases = torch.load(shared_dir / "reference_values" / "kd" / f"{name}.pt", weights_only=True)["cases"]
    assert cases
    for case in cases:
        inputs = case["inputs"]
        student = inputs["student_logits"].clone().requires_grad_()
        loss = FILES[name](student, inputs["teacher_logits"], inputs.get("labels"), case["hyper"])
        (gradient,) = torch.autograd.grad(loss, student)
        # At student = teacher the reference itself is rounding noise, hence the absolute tolerance.
        torch.testing.assert_close(loss, case["outputs"]["loss"], rtol=1e-9, atol=1e-10, msg=case["name"])
        torch.testing.assert_close(
            gradient, case["grads"]["student_logits"], rtol=1e-7, atol=1e-9, msg=lambda m, c=case: f"{c['name']}: {m}"
        )
