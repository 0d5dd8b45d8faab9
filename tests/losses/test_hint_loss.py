from __future__ import annotations

import pytest
import torch

from visiondistill.losses import hint_loss


def test_it_is_the_mean_squared_difference():
    student, teacher = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    rows = hint_loss(student, teacher, "none")
    by_hand = [((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(rows, torch.stack(by_hand))
    torch.testing.assert_close(hint_loss(student, teacher), rows.mean())
    assert hint_loss(student, student) == 0
    assert torch.autograd.gradcheck(hint_loss, (student.requires_grad_(), teacher.requires_grad_()))


def test_half_precision_is_lifted_and_shapes_must_agree():
    student = torch.full((1, 1, 1, 4), 1e4, dtype=torch.float16)
    torch.testing.assert_close(hint_loss(student, -student), torch.tensor(4e8))
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 4\) and \(1, 1, 4, 1\)"):
        hint_loss(student, student.mT)
