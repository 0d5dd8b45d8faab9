"""An ensemble answers with its members' mean, each asked once with its own pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from visiondistill import Distiller
from visiondistill.data import Stream, TensorData
from visiondistill.models import Network, SmallConvNet, Timm
from visiondistill.teachers import Ensemble, as_teacher
from visiondistill.terms import KL, Hint


class Fixed(nn.Module):
    """The same logits for every image, and how often it was asked, of what size, with gradients or without."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))
        self.asked: list[tuple[torch.Size, bool]] = []
        self.num_classes = len(logits)

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((x.shape, torch.is_grad_enabled()))
        return self.logits.expand(len(x), -1)


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_average_at_the_temperature_that_reads_them(temperature):
    members = {"a": Fixed(3.0, 0.0, -2.0), "b": Fixed(-1.0, 2.0, 0.5)}
    logits = Ensemble(members, temperature=temperature)(IMAGES)
    mean = sum(m.logits.div(temperature).softmax(0) for m in members.values()) / 2
    torch.testing.assert_close((logits / temperature).softmax(1), mean.expand(4, 3))


def test_logits_average_plainly():
    logits = Ensemble({"a": Fixed(3.0, 0.0), "b": Fixed(-1.0, 2.0)}, mean="logits")(IMAGES)
    assert logits.tolist() == [[1.0, 1.0]] * 4


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_equal_members_answer_as_one(mean):
    one = Fixed(3.0, 0.0, -2.0)
    torch.testing.assert_close(
        Ensemble({"a": one, "b": Fixed(3.0, 0.0, -2.0)}, mean, 2.0)(IMAGES).softmax(1), one(IMAGES).softmax(1)
    )


def test_extreme_and_half_precision_logits_stay_finite():
    logits = Ensemble({"a": Fixed(1e4, -1e4), "b": Fixed(-1e4, 1e4)})(IMAGES)
    torch.testing.assert_close(logits.softmax(1), torch.full((4, 2), 0.5))
    halves = Ensemble({"a": Fixed(3.0, 0.0).half(), "b": Fixed(0.0, 3.0).half()})(IMAGES)
    assert halves.dtype == torch.float32
    assert halves[0, 0].item() == pytest.approx(math.log((1 / (1 + math.exp(-3)) + 1 / (1 + math.exp(3))) / 2))


def test_each_member_is_asked_once_without_gradients_with_its_own_pixels():
    inner = {"plain": Fixed(1.0, 0.0), "resized": Fixed(0.0, 1.0)}
    members = {
        "plain": Network(inner["plain"]),
        "resized": Network(inner["resized"], [0.5] * 3, [0.25] * 3, input_size=(3, 24, 24)),
    }
    data = TensorData({"image": IMAGES})
    method = Distiller(
        Ensemble(members),
        student=SmallConvNet(in_channels=3, num_classes=2),
        terms={"kd": KL(temperature=1.0)},
        streams={"train": Stream(data, batch_size=4)},
    )
    with torch.no_grad():  # as the engine prepares
        batch = method.prepare({"train": {"image": IMAGES, "index": torch.arange(4)}}, None, frozenset({"student"}))
    torch.testing.assert_close(batch["teacher"]["logits"].softmax(1), torch.full((4, 2), 0.5))
    assert inner["plain"].asked == [(torch.Size([4, 3, 16, 16]), False)]
    assert inner["resized"].asked == [(torch.Size([4, 3, 24, 24]), False)]
    assert list(method.frozen) == ["teacher"]
    assert "teacher" not in method.players


def test_real_networks_of_two_sizes_and_normalisations_answer_as_each_alone():
    members = {"a": Timm("resnet10t", num_classes=5, input_size=(3, 32, 32)), "b": Timm("cifar_resnet8", num_classes=5)}
    ensemble = Ensemble(members).eval()
    assert ensemble.num_classes == 5
    with torch.no_grad():
        alone = [network(IMAGES).logits.softmax(1) for network in members.values()]
        torch.testing.assert_close(ensemble(IMAGES).softmax(1), sum(alone) / 2)
    assert not torch.equal(members["a"].scale, members["b"].scale)


def test_an_ensemble_has_no_features():
    teacher = as_teacher(Ensemble({"a": SmallConvNet(in_channels=3)}))
    with pytest.raises(TypeError, match="Ensemble has no features by stage"):
        teacher.stage_index(-1)
    with pytest.raises(ValueError, match="term 'hint': Ensemble has no features"):
        Distiller(
            teacher,
            student=Network(SmallConvNet(in_channels=3), input_size=(3, 16, 16)),
            terms={"hint": Hint(student_stage=-1, teacher_stage=-1)},
            streams={"train": Stream(TensorData({"image": IMAGES, "label": torch.arange(4)}), batch_size=4)},
        )


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="same classes apart, got a: 2, b: 3"):
        Ensemble({"a": Fixed(0.0, 1.0), "b": Fixed(0.0, 1.0, 2.0)})
    with pytest.raises(ValueError, match="at least one"):
        Ensemble({})
    with pytest.raises(ValueError, match="'probabilities' or 'logits', got 'median'"):
        Ensemble({"a": Fixed(0.0)}, mean="median")
    with pytest.raises(ValueError, match="temperature must be a number > 0, got 0"):
        Ensemble({"a": Fixed(0.0)}, temperature=0)
