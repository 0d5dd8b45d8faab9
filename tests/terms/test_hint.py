"""Hints: the released regressor as it was released, and which of both fits where."""

from __future__ import annotations

import pytest
import torch
from distilling import CLASSES, distiller, net, play, prepared
from torch import nn
from torch.nn.functional import mse_loss

from visiondistill.engine.errors import SettingsError
from visiondistill.losses import hint_loss
from visiondistill.models import Network, SmallConvNet
from visiondistill.terms import Hint
from visiondistill.terms.hint import _released


def test_the_released_regressor_equals_the_released_one(shared_dir) -> None:
    cases = torch.load(shared_dir / "reference_values" / "kd" / "fitnet_regressor.pt", weights_only=True)["cases"]
    for case in cases:
        inputs = case["inputs"]
        student, teacher = inputs["student_feat"].clone().requires_grad_(), inputs["teacher_feat"]
        regressor = _released(student.shape[1:], teacher.shape[1:]).double()
        regressor.load_state_dict(inputs["state_dict"])
        value = hint_loss(regressor(student), teacher)
        torch.testing.assert_close(value, case["outputs"]["loss"], rtol=1e-9, atol=1e-10)
        (gradient,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(gradient, case["grads"]["student_feat"], rtol=1e-9, atol=1e-10)
    assert len(cases) == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "kernel", "stride"),
    [
        ((6, 8, 8), (10, 8, 8), nn.Conv2d, (1, 1), (1, 1)),
        ((6, 16, 16), (10, 8, 8), nn.Conv2d, (3, 3), (2, 2)),
        ((6, 8, 8), (10, 16, 16), nn.ConvTranspose2d, (4, 4), (2, 2)),
        ((6, 7, 9), (10, 5, 4), nn.Conv2d, (3, 6), (1, 1)),
    ],
)
def test_its_convolution_hangs_on_the_sizes(ours, theirs, kind, kernel, stride) -> None:
    regressor = _released(ours, theirs)
    assert (type(regressor.conv), regressor.conv.kernel_size, regressor.conv.stride) == (kind, kernel, stride)
    predicted = regressor(torch.randn(2, *ours))
    assert predicted.shape == (2, *theirs)
    assert predicted.min() == 0


def test_sizes_that_it_cannot_reach_are_refused() -> None:
    student = Network(SmallConvNet((4, 5, 6), num_classes=CLASSES), input_size=(1, 8, 8))
    with pytest.raises(SettingsError, match=r"not to 8x8: choose other stages, or regressor: linear"):
        distiller({"hint": Hint(-1, 0, "released")}, student=student)
    distiller({"hint": Hint(-1, 0)}, student=student)
    with pytest.raises(ValueError, match="regressor must be"):
        Hint(regressor="cubic")


def test_the_term_is_the_loss_after_the_regressor() -> None:
    """From twice the teacher's resolution, which the linear one would average."""
    method = distiller({"hint": Hint(0, 1, "released")}, student=net(4, 5))
    batch = prepared(method)
    feature = method.players["student"](batch["train"]["image"], (0,)).features[0]
    theirs = batch["teacher"]["features"][1]
    assert feature.shape[-1] == 2 * theirs.shape[-1]
    expected = mse_loss(method.players["hint_regressor"](feature), theirs)
    torch.testing.assert_close(method.student_loss(batch)[0]["hint"], expected)


def test_it_trains_and_is_left_behind(tmp_path) -> None:
    method = distiller({"hint": Hint(0, 1, "released")})
    before = method.players["hint_regressor"].conv.weight.clone()
    result = play(method, tmp_path / "run")
    assert not torch.equal(before, method.players["hint_regressor"].conv.weight)
    assert result.product.state_dict().keys() == net(4, 5).state_dict().keys()
