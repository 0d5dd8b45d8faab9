"""Augmentors inside the `Distiller`, on the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from visiondistill import Distiller
from visiondistill.augmentors import Augment, Chain, Mix
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Optim, Run, Stage, train
from visiondistill.models import SmallConvNet
from visiondistill.parts import Part
from visiondistill.terms import KL


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallConvNet((4, 6), in_channels=3, num_classes=3)


def images() -> TensorData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TensorData({"image": pixels, "label": torch.arange(24) % 3})


class Seen(KL):
    """Keeps the images that student and teacher were given."""

    def prepare(self, batch, draw, due):
        self.images = batch["train"]["image"]
        return batch


def run(folder: Path, augmentor: Part | None, steps: int = 5, **settings) -> dict[str, Tensor]:
    method = Distiller(
        net(1), student=net(2), terms={"kd": KL()}, streams={"train": Stream(images(), 8)}, augmentor=augmentor
    )
    given = {"output_dir": str(folder), "batch_size": 8, "noise_block": 2, "progress": False, "device": "cpu"}
    train([Stage(method, steps, {"default": Optim(lr=1e-2)})], Run(**given | settings))
    return {name: tensor.clone() for name, tensor in method.product().state_dict().items()}


def chain() -> Chain:
    return Chain([Augment(shift=2, zoom=0.5, contrast=0.3, saturation=0.3), Mix(num_classes=3)])


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path):
    whole = run(tmp_path / "whole", chain())
    split = run(tmp_path / "split", chain(), grad_accum_steps=2)
    plain = run(tmp_path / "plain", None)
    assert apart(whole, split) < 1e-5
    assert apart(whole, plain) > 1e-3


def test_a_resumed_run_is_the_same_run(tmp_path: Path):
    whole = run(tmp_path / "whole", chain(), checkpoint_every=3)
    middle = tmp_path / "whole" / "checkpoints" / "step_000000003"
    resumed = run(tmp_path / "resumed", chain(), resume=str(middle))
    assert apart(whole, resumed) == 0


@pytest.mark.parametrize("augmentor", [Augment(flip=1.0), Mix(num_classes=3)])
def test_student_and_teacher_get_the_augmented_images(augmentor: Part):
    from visiondistill.engine import Draw

    term, stream = Seen(), Stream(images(), 8)
    method = Distiller(net(1), student=net(2), terms={"kd": term}, streams={"train": stream}, augmentor=augmentor)
    raw = {"train": next(stream.open(0, [(0, 8)], 0))[0]}
    draw = Draw(0, 0, {"": (0, 8), "train": (0, 8)}, 2, torch.device("cpu"))
    with torch.no_grad():
        batch = method.prepare(raw, draw, frozenset({"student"}))
        expected = method.frozen["teacher"](batch["train"]["image"]).logits
    assert torch.equal(term.images, batch["train"]["image"])
    assert not torch.equal(batch["train"]["image"], raw["train"]["image"])
    torch.testing.assert_close(batch["teacher"]["logits"], expected)
