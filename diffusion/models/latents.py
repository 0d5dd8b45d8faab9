"""Images that were encoded once, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion.codecs import Codec
from diffusion.conditions import Conditions, Prompts
from diffusion.generator import Generator
from visiondistill.data import Source, Split, TensorData, in_order
from visiondistill.data.origin import Origin
from visiondistill.data.source import TRAIN
from visiondistill.engine.state import fingerprint, sha256_of

MANIFEST = ".json"
CURE = "make it anew: visiondistill store latents --pipeline FOLDER --data.root DIR --file"


class Codes(TensorData):
    """Columns "code" `[N, *shape]` and "label" int64 `[N]` that know which codec made them.

    With captions there is a column "prompt" int64 `[N]`, too: which of a generator's prompts each image shows.

    Args:
        columns: these.
        file: where they come from, for messages.
        codec: its digest.
        prompts: digest of those that "prompt" counts; None without captions.
    """

    def __init__(self, columns: dict[str, torch.Tensor], file: Path, codec: str, prompts: str | None = None) -> None:
        super().__init__(columns)
        self.file, self.codec, self.prompts = file, codec, prompts

    def require(self, codec: Codec) -> None:
        """Raises ValueError unless `codec` is the one that made them."""
        _require(self.file, {"codec": self.codec}, {"codec": digest_of(codec)})

    def require_prompts(self, conditions: Conditions | None) -> None:
        """Raises ValueError where "prompt" counts other prompts than those of `conditions`."""
        if self.prompts is not None and isinstance(conditions, Prompts):
            _require(self.file, {"prompts": self.prompts}, {"prompts": conditions.digest}, " --captions FILE")


class CachedLatents(Source):
    """Another source whose training images were encoded once; validation and test images stay images.

    Latent generators are then trained without an encoder's pass per step. Every epoch sees the same
    codes: images as an evaluation sees them, not cut at random. Codes of another VAE than the
    generator's are refused by the method that reads them. In a recipe:

        data:
          class_path: diffusion.models.CachedLatents
          init_args:
            source: {class_path: visiondistill.data.ImageFolder, init_args: {root: photos, size: 256}}
            file: latents.safetensors

    Args:
        source: the whole set, as it was encoded.
        file: what `visiondistill store latents` wrote of its training images.

    Raises:
        ValueError: a file or manifest that is missing or damaged, or of other images.
    """

    def __init__(self, source: Source, file: str) -> None:
        codes = _read(Path(file), _images(source, TRAIN))
        train = source.split(TRAIN)._replace(data=codes)
        splits = {name: source.split(name) for name in source.splits} | {TRAIN: train}
        captions = "" if codes.prompts is None else " with their captions"
        note = f"train: latents of {len(codes)} images{captions} from {file}"
        self._source, self._codes = source, codes
        super().__init__(splits, source.classes, source.input_size, 0, 0, notes=[note])

    def train(self) -> Any:
        return self._source.train()

    @property
    def crop(self) -> dict[str, Any]:
        return self._source.crop

    @property
    def _how(self) -> str:
        captions = "" if self._codes.prompts is None else fingerprint({"prompt": self._codes.columns["prompt"].cpu()})
        return f"{self._source._how}{self._codes.codec}{self._codes.prompts or ''}{captions}"


def cache_latents(
    generator: Generator,
    source: Source,
    path: str | Path,
    *,
    split: str = TRAIN,
    batch_size: int = 32,
    captions: Sequence[str] | None = None,
) -> Codes:
    """Encode a split once by a generator's codec and keep the codes with their labels.

    Writes `path` (safetensors with "code" `[N, *shape]`, "label" `[N]` and of captions "prompt" `[N]`)
    and beside it a manifest `path` + ".json" that says of which images and by which codec.

    Args:
        generator: whose codec encodes, where it lies.
        source: of the images, at the size of the generator's.
        path: a safetensors file.
        split: of the source.
        batch_size: images that are encoded at a time.
        captions: of all images that the data list, in their order: training images that were carved off
            or cannot be read have one, too. Each is one of the generator's prompts.

    Raises:
        ValueError: images of another size than the generator's; captions of another number, for a generator
            without prompts, or that are none of its prompts.
    """
    from safetensors.torch import save_file

    if source.input_size is not None and tuple(source.input_size) != tuple(generator.input_size):
        raise ValueError(f"images are {tuple(source.input_size)}, the codec's are {tuple(generator.input_size)}")
    path, images = Path(path), source.split(split)
    made_of, columns = identity(generator, source, split), {"label": images.label.cpu()}
    if captions is not None:
        columns["prompt"] = _shown(generator.conditions, images, captions)
        made_of["prompts"] = generator.conditions.digest
    device = next((held.device for held in generator.codec.parameters()), torch.device("cpu"))
    with torch.no_grad():
        codes = [generator.codec.encode(batch["image"].to(device)).cpu() for batch in in_order(images.data, batch_size)]
    columns["code"] = torch.cat(codes)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file({name: column.contiguous() for name, column in columns.items()}, unfinished)
    sums = sha256_of(unfinished)
    # The manifest last: without it the file is not opened.
    unfinished.replace(path)
    Path(f"{path}{MANIFEST}").write_text(json.dumps(made_of | {"sha256": sums}, indent=1), "utf-8")
    return Codes(columns, path, made_of["codec"], made_of.get("prompts"))


def open_latents(path: str | Path, generator: Generator, source: Source, *, split: str = TRAIN) -> Codes:
    """What `cache_latents` wrote, if it was made by this codec of these images.

    Raises:
        ValueError: a file or manifest that is missing or damaged, another codec, other images, or captions that
            count other prompts.
    """
    codes = _read(Path(path), identity(generator, source, split))
    codes.require_prompts(generator.conditions)
    return codes


def identity(generator: Generator, source: Source, split: str) -> dict[str, Any]:
    """What codes depend on: the images and labels, the codec's weights and settings, the shape of a code."""
    return _images(source, split) | {"codec": digest_of(generator.codec), "shape": list(generator.shape)}


def digest_of(codec: Codec) -> str:
    """Of a codec's settings and weights."""
    return hashlib.sha256(f"{codec!r}{fingerprint(codec.state_dict())}".encode()).hexdigest()


def _shown(conditions: Conditions | None, images: Split, captions: Sequence[str]) -> torch.Tensor:
    """Which prompt each image of a split shows, int64 `[N]`."""
    if not isinstance(conditions, Prompts):
        raise ValueError("captions are for a generator that is conditioned on prompts, which this one is not")
    origin = Origin.of(len(images.label)) if images.origin is None else images.origin
    if len(captions) != origin.count:
        raise ValueError(
            f"{len(captions)} captions for {origin.count} images: give one for each that the data list, in their order"
        )
    return conditions.rows([captions[place] for place in origin.row.tolist()])


def _images(source: Source, split: str) -> dict[str, Any]:
    held = source.split(split)
    # Sources of files know their files' digests; of tensors in memory the tensors themselves are asked.
    pixels = fingerprint(held.data.columns) if held.digest is None and isinstance(held.data, TensorData) else ""
    contents = source.stream(1, split=split).contents
    return {"data": hashlib.sha256(f"{contents}{pixels}".encode()).hexdigest(), "split": split}


def _read(path: Path, wanted: dict[str, Any]) -> Codes:
    from safetensors.torch import load_file

    manifest = Path(f"{path}{MANIFEST}")
    for file in (path, manifest):
        if not file.is_file():
            raise ValueError(f"{file} is missing; {CURE} {path}")
    stored = json.loads(manifest.read_text("utf-8"))
    _require(path, stored, wanted)
    if sha256_of(path) != stored["sha256"]:
        raise ValueError(f"{path} is damaged: its sha256 is not the one in {manifest}; {CURE} {path}")
    return Codes(load_file(path), path, stored["codec"], stored.get("prompts"))


def _require(path: Path, stored: dict[str, Any], wanted: dict[str, Any], more: str = "") -> None:
    for name, value in wanted.items():
        if stored.get(name) != value:
            told = f"{path} was made with another {name} ({stored.get(name)}, now {value})"
            raise ValueError(f"{told}; {CURE} {path}{more}")
