"""Scores of a classifier: against torchmetrics, against hand counts, and whatever the reading."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from visiondistill.data import TensorData
from visiondistill.eval import Answers, agreement, calibration_error, collect, evaluate
from visiondistill.models import Network, SmallConvNet


def random_answers(rows: int = 400, classes: int = 12, scale: float = 2.0, seed: int = 0) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (rows,), generator=generator)
    logits = scale * torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), label] += scale
    return Answers(logits, label)


class Table(nn.Module):
    """The image's first pixel, times N, is the row of the logits that it answers with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[(images[:, 0, 0, 0] * len(self.logits)).round().long()]


class Pairs:
    """The same images as a map-style set of pairs."""

    def __init__(self, data: TensorData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.data[row]["image"], int(self.data[row]["label"])


def numbered(answers: Answers) -> TensorData:
    rows = len(answers.label)
    return TensorData({"image": (torch.arange(rows) / rows).view(-1, 1, 1, 1), "label": answers.label})


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_scores_are_those_of_torchmetrics(scale):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    answers = random_answers(scale=scale)
    scores, classes = answers.scores(), answers.logits.shape[1]
    probabilities = answers.logits.double().softmax(1)
    # torchmetrics puts a confidence of exactly 1 into a sixteenth bin of its own, and adds up in float32.
    below_one = probabilities.clamp(max=1 - 2**-24)
    micro = {"num_classes": classes, "average": "micro"}
    assert scores.accuracy == pytest.approx(multiclass_accuracy(probabilities, answers.label, **micro).item())
    assert scores.top5 == pytest.approx(multiclass_accuracy(probabilities, answers.label, top_k=5, **micro).item())
    theirs = multiclass_calibration_error(below_one, answers.label, classes, n_bins=15).item()
    assert scores.ece == pytest.approx(theirs, abs=1e-6)
    nll = nn.functional.cross_entropy(answers.logits.double(), answers.label).item()
    assert scores.nll == pytest.approx(nll, rel=1e-12)
    assert scores.correct == round(scores.accuracy * scores.count)


def test_confidences_of_one_are_in_the_last_bin():
    # Bins (14/15, 1]: one right of two at confidence 1, one right at 0.95. A bin of its own for 1 would give 0.3833.
    confidence, right = torch.tensor([1.0, 1.0, 0.95]).double(), torch.tensor([True, False, True])
    assert calibration_error(confidence, right).item() == pytest.approx(abs(2 - 2.95) / 3)


def test_scores_stay_finite_at_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    scores = Answers(logits, torch.tensor([0, 0])).scores()
    assert scores.nll == pytest.approx(1e4)
    assert scores.ece == pytest.approx(0.5)
    assert scores.top5 is None


def test_every_image_counts_once_whatever_the_reading():
    answers = random_answers(rows=37)
    data, model = numbered(answers), Table(answers.logits)
    for source in (data, Pairs(data)):
        for batch_size in (1, 10, 37, 100):
            got = collect(model, source, batch_size)
            assert torch.equal(got.logits, answers.logits)
            assert torch.equal(got.label, answers.label)
    assert evaluate(model, data, 10) == evaluate(model, Pairs(data), 37)


def test_images_without_a_label_are_left_out_of_scores_and_kept_for_agreement():
    answers = random_answers(rows=40)
    hidden = Answers(answers.logits, answers.label.where(torch.arange(40) < 30, -1))
    scores = evaluate(Table(answers.logits), numbered(hidden))
    assert scores == Answers(answers.logits[:30], answers.label[:30]).scores()
    other = answers.logits.clone()
    other[30:] = -other[30:]
    changed = (other.argmax(1) != answers.logits.argmax(1)).double().mean().item()
    assert changed > 0
    assert agreement(Table(answers.logits), Table(other), numbered(hidden)) == pytest.approx(1 - changed)


def test_looking_leaves_modes_and_generators_alone():
    net = Network(SmallConvNet(norm="batch"))
    net.train()
    net.model.head.eval()
    before = torch.get_rng_state()
    statistics = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    evaluate(net, TensorData({"image": torch.rand(9, 1, 8, 8, generator=torch.Generator()), "label": torch.arange(9)}))
    assert net.training
    assert not net.model.head.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in net.state_dict().items())


def test_what_cannot_be_measured_is_refused_by_name():
    answers = random_answers(rows=6, classes=4)
    data = numbered(answers)
    with pytest.raises(ValueError, match="none of the 6 images has a label"):
        evaluate(Table(answers.logits), numbered(Answers(answers.logits, torch.full((6,), -1))))
    with pytest.raises(ValueError, match=r"a label 7, but the classifier tells 4 classes"):
        evaluate(Table(answers.logits), numbered(Answers(answers.logits, torch.tensor([0, 1, 2, 3, 0, 7]))))
    broken = answers.logits.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 6 images are not finite, the first being number 3"):
        evaluate(Table(broken), data)


def test_half_precision_answers_are_scored_in_double_precision():
    answers = random_answers()
    half = answers.logits.bfloat16()
    scores = evaluate(Table(half), numbered(answers))
    assert scores == Answers(half.float(), answers.label).scores()
