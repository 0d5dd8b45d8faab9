"""Logits that were computed once, in a file; and how such a file is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.data.source import TRAIN, Source
from visiondistill.data.stream import Stream, in_order
from visiondistill.data.tensors import TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch
from visiondistill.models.network import Network, as_network, evaluating
from visiondistill.teachers.base import Teacher

LOGITS, DIGEST = "train_logits", "images"
"""The tensor, and the entry of the metadata that says which images it is about."""
AT_ONCE = 256
CURE = "visiondistill store writes such a file for your data"


class Stored(Teacher):
    """Answers from a safetensors file, by the number that each image has in the training set as it was given.

    Validation images may be carved off and training images pruned; the images must be those that the file was
    written for, in the same order, and no augmentor may change them but `Augment` by mirroring, if the file
    has answers to mirror images. Images of other sizes are taken for the same ones.

    Args:
        file: with `train_logits`, floating `[V, N, K]`: of the N images as they are and, where V is 2, mirrored.
            Metadata "images", where it is there, is the digest of the images; see `store_targets`.

    Raises:
        SettingsError: no such file, or it holds something else.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        logits, metadata = _read(Path(file))
        self.name, self.source, self.digest = "stored logits", file, metadata.get(DIGEST)
        self.num_classes = logits.shape[2]
        self.replays = frozenset({"flip"} if len(logits) == 2 else ())
        # Not persistent: it is in its file, a checkpoint need not hold it.
        self.register_buffer("logits", logits, persistent=False)

    def settle(self, student: Network, streams: Mapping[str, Stream]) -> None:
        stream = streams[TRAIN]
        if not isinstance(stream, Stream):
            raise SettingsError(f"stored logits go by image numbers, and {type(stream).__name__} is no data.Stream")
        if stream.transform is not None:
            raise SettingsError(
                f"{self.source} has answers to whole images, but the data cut them at random: set random_crop to null"
            )
        row = self._rows(stream)
        self._check_labels(row, _labels(stream.data))
        self.register_buffer("row", row, persistent=False)

    def _rows(self, stream: Stream) -> Tensor:
        """Where the training images are in the file, int64 `[N]`."""
        origin = stream.origin
        if origin.count != self.logits.shape[1]:
            raise SettingsError(
                f"{self.source} has logits of {self.logits.shape[1]} images, the training set has {origin.count} "
                f"before anything is carved off: name the data that it was written for; {CURE}"
            )
        if None not in (self.digest, origin.digest) and self.digest != origin.digest:
            raise SettingsError(
                f"{self.source} was written for other training images, or for these in another order: {CURE}"
            )
        row = origin.row.to(self.logits.device)
        missing = int((~self.logits[:, :, 0].isfinite().all(0)[row]).sum())
        if missing:
            raise SettingsError(f"{self.source} has no logits for {missing} of the {len(row)} images: {CURE}")
        return row

    def _check_labels(self, row: Tensor, label: Tensor | None) -> None:
        from visiondistill.eval.classify import chance_level

        if label is None or not (label >= 0).any():
            return
        known = (label >= 0).to(row.device)
        right = (self.logits[0].argmax(1)[row] == label.to(row.device))[known].double().mean().item()
        if right <= chance_level(int(known.sum()), self.num_classes):
            raise SettingsError(
                f"{self.source}: its highest logit is the label of {right:.1%} of the training images, which is "
                f"chance: their order or that of the classes is not the one that it was written for; {CURE}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Refused: images alone do not say which ones they are."""
        raise SettingsError(f"{self.source} has answers to the training images alone: ask the network itself")

    def targets(self, data: Batch) -> dict[str, Any]:
        row, flip = self.row[data["index"]], data.get("view", {}).get("flip")
        logits = self.logits[0 if flip is None else flip.long(), row]
        return {"logits": logits.to(torch.promote_types(logits.dtype, torch.float32))}


def store_targets(
    network: nn.Module, source: Source, file: str | Path, teacher: str = "", mirrored: bool = True
) -> int:
    """Write what a network answers to the training images of a source, in fp16, for `Stored`.

    It sees them as the source gives them to an evaluation, those too that are carved off for validation or test.

    Args:
        network: a `Network`, or any classifier of pixels in [0, 1]; used in eval mode, on its own device.
        source: whole, not pruned.
        file: a safetensors file.
        teacher: what the metadata call it.
        mirrored: ask about mirror images as well, without which students cannot be trained on them.

    Returns:
        how many images were asked about.

    Raises:
        SettingsError: logits that are not finite in fp16.
    """
    from safetensors.torch import save_file

    splits = [split for name in source.splits if (split := source.split(name)).origin is not None]
    count, digest = splits[0].origin.count, splits[0].origin.digest
    row = torch.cat([split.origin.row for split in splits])
    answers = torch.cat([_answers(as_network(network), split.data, mirrored) for split in splits], 1)
    if not answers.isfinite().all():
        raise SettingsError(f"{teacher or type(network).__name__} gives logits that are not finite in fp16")
    # NaN where a file could not be read: whoever can read it later must not be taught at random.
    logits = torch.full((len(answers), count, answers.shape[2]), torch.nan, dtype=answers.dtype)
    logits[:, row] = answers
    metadata = {"teacher": teacher, "answered": str(len(row))} | ({} if digest is None else {DIGEST: digest})
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file({LOGITS: logits}, file, metadata)
    return len(row)


@torch.no_grad()
def _answers(network: Network, data: Any, mirrored: bool) -> Tensor:
    """fp16 `[V, N, K]`, on the CPU."""
    device, parts = network.scale.device, []
    with evaluating(network):
        for batch in in_order(data, AT_ONCE):
            image = batch["image"].to(device)
            views = [image, image.flip(-1)] if mirrored else [image]
            parts.append(torch.stack([network(view).logits.half().cpu() for view in views]))
    return torch.cat(parts, 1)


def _read(file: Path) -> tuple[Tensor, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise SettingsError(f"there is no file of stored logits {str(file)!r}: {CURE}")
    try:
        with safe_open(file, "pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
            logits = opened.get_tensor(LOGITS) if LOGITS in names else None
    except SafetensorError as error:
        raise SettingsError(f"{file} is not a readable safetensors file: {error}") from error
    if logits is None:
        raise SettingsError(f"{file} has no tensor {LOGITS!r}; there are {', '.join(names)}: {CURE}")
    if logits.ndim != 3 or len(logits) not in (1, 2) or not logits.is_floating_point():
        raise SettingsError(
            f"{file}: {LOGITS!r} must be floating [1 or 2 views, images, classes], got {logits.dtype} "
            f"{list(logits.shape)}"
        )
    return logits, metadata


def _labels(data: Any) -> Tensor | None:
    """Of all images, where they can be had without reading these."""
    if isinstance(data, TensorData):
        return data.columns.get("label")
    targets = getattr(data, "targets", None)
    return None if targets is None else torch.as_tensor(targets)
