from __future__ import annotations

import pytest
import torch

from visiondistill.data import TensorData


def test_rows_are_picked_and_uint8_becomes_unit_interval():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    data = TensorData({"image": image, "label": torch.tensor([4, 5, 6]), "weight": torch.tensor([0.1, 0.2, 0.3])})
    rows = data.rows(torch.tensor([2, 1]))
    assert rows["image"].flatten().tolist() == pytest.approx([1.0, 0.2])
    assert rows["label"].tolist() == [6, 5]
    assert rows["weight"].tolist() == pytest.approx([0.3, 0.2])
    assert rows["index"].tolist() == [2, 1]


def test_floating_images_keep_value_and_precision():
    image = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(TensorData({"image": image}).rows(torch.tensor([1]))["image"], image[1:])


def test_labelled_fraction_counts_the_labels():
    image = torch.zeros(4, 1, 1, 1)
    assert TensorData({"image": image, "label": torch.tensor([0, -1, -1, 3])}).labelled_fraction == 0.5
    assert TensorData({"image": image}).labelled_fraction == 0.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "empty"),
        ({"image": torch.zeros(0, 1, 2, 2)}, "empty"),
        ({"image": torch.zeros(2, 1, 2, 2), "label": torch.zeros(3, dtype=torch.int64)}, "different lengths"),
        ({"image": torch.zeros(2, 2, 2)}, r"\[N, C, H, W\]"),
        ({"image": torch.zeros(2, 1, 2, 2, dtype=torch.int64)}, "floating or uint8"),
        ({"label": torch.zeros(3)}, r"int64 \[N\]"),
        ({"index": torch.zeros(3)}, "'index'"),
    ],
)
def test_unfit_columns_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        TensorData(columns)
