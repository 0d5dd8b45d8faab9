"""One sample of a map-style data set: what it may be, how it is seeded, how a batch is made of many."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from visiondistill.data.pixels import opaque
from visiondistill.engine.rng import key


class Samples:
    """A map-style data set whose samples are pure functions of (seed, epoch, index).

    While a sample is made, the default generators of torch, numpy and Python are seeded from
    these three numbers and put back afterwards: transforms inside the data set repeat on resume,
    with any number of workers, and disturb nobody.

    Args:
        data: `data[index]` is a dict with "image" (and "label", ...), or a pair `(image, label)`;
            images as in `to_image`, labels integers, -1 for none.
        transform: of the image before it becomes a tensor; receives a `torch.Generator` seeded
            the same way if it has a parameter `generator`.
        seed: of the run.
    """

    def __init__(self, data: Any, transform: Callable | None, seed: int) -> None:
        self.data, self.transform, self.seed = data, transform, seed
        self.takes_generator = transform is not None and "generator" in inspect.signature(transform).parameters

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        seed = key(self.seed, "sample", epoch, index)
        with _seeded(seed):
            sample = self.named(index)
            if self.takes_generator:
                sample["image"] = self.transform(sample["image"], generator=torch.Generator().manual_seed(seed))
            elif self.transform is not None:
                sample["image"] = self.transform(sample["image"])
        return sample | {"image": to_image(sample["image"]), "index": index}

    def named(self, index: int) -> dict[str, Any]:
        """The sample as its data set gives it, under the names of its parts."""
        sample = self.data[index]
        if isinstance(sample, Mapping) and "image" in sample:
            return dict(sample)
        if isinstance(sample, tuple | list) and len(sample) == 2:
            return {"image": sample[0], "label": sample[1]}
        held = sorted(sample) if isinstance(sample, Mapping) else f"{type(sample).__name__}"
        raise TypeError(
            f"sample {index} of {type(self.data).__name__} must be a dict with 'image' or a pair "
            f"(image, label), got {held}"
        )


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of samples; raises ValueError naming two samples whose images differ in shape."""
    first = samples[0]
    for sample in samples:
        if sample["image"].shape != first["image"].shape:
            raise ValueError(
                f"images of one batch must have one shape: sample {first['index']} has {tuple(first['image'].shape)}, "
                f"sample {sample['index']} has {tuple(sample['image'].shape)}; give the stream a transform that resizes"
            )
    batch = default_collate(list(samples))
    return batch | {"label": batch["label"].long()} if "label" in batch else batch


def to_image(image: Any) -> Tensor:
    """`[C, H, W]` floating in [0, 1] from a tensor, an array or a PIL image.

    Tensors are `[C, H, W]` or `[H, W]`, arrays `[H, W, C]` or `[H, W]`; uint8 is divided by 255,
    floating values are taken as they are. PIL images keep one channel in modes 1, L and I;16 and
    become RGB otherwise, transparency composited on white.

    Raises:
        TypeError: anything else.
    """
    if isinstance(image, Tensor):
        return as_float_image(image if image.ndim == 3 else image[None])
    if isinstance(image, np.ndarray):
        array = image if image.ndim == 3 else image[..., None]
        return as_float_image(torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))))
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TypeError(f"an image must be a tensor, an array or a PIL image, got {type(image).__name__}")
    if image.mode.startswith("I;16"):
        return to_image(np.array(image).astype(np.float32) / 65535)
    image = opaque(image)
    return to_image(np.array(image.convert("L" if image.mode in ("1", "L") else "RGB")))


def as_float_image(image: Tensor) -> Tensor:
    """uint8 divided by 255 to float32; floating tensors as they are. Raises TypeError for other types."""
    if image.is_floating_point():
        return image
    if image.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 or floating in [0, 1], got {image.dtype}")
    return image.float() / 255


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - what third-party transforms read
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
