"""A folder of odd and bad images, from the command line to the pixels that a student is trained on."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import re
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visiondistill import recipes
from visiondistill.cli import main
from visiondistill.terms import CE, Needs, View

pytestmark = pytest.mark.usefixtures("undrawn_reports")

SIDE, BATCH = 16, 4
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def upright() -> np.ndarray:
    """Red on top, and blue in the left half of what is below."""
    values = np.full((SIDE, SIDE, 3), 255, np.uint8)
    values[:4], values[4:, :8] = RED, BLUE
    return values


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left of how it is to be seen
    return encoded(Image.fromarray(np.ascontiguousarray(np.rot90(upright()))), exif=exif)


def palette() -> bytes:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([*RED, *GREEN])
    image.paste(0, (0, 0, 8, SIDE))
    return encoded(image, transparency=0)


def animation() -> bytes:
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in (RED, BLUE))
    return encoded(first, "GIF", save_all=True, append_images=[second])


def plain(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (SIDE, SIDE, 3))


ODD: dict[str, tuple[bytes, np.ndarray, int]] = {
    "rotated.png": (rotated(), upright(), 0),
    "print.jpg": (encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG"), plain(*RED), 4),
    "deep.png": (encoded(Image.fromarray(np.full((SIDE, SIDE), 32896, np.uint16))), plain(128, 128, 128), 0),
    "palette.png": (palette(), np.where(np.arange(SIDE)[None, :, None] < 8, plain(255, 255, 255), plain(*GREEN)), 0),
    "animation.GIF": (animation(), plain(*RED), 0),
    "grey.png": (encoded(Image.new("L", (SIDE, SIDE), 7)), plain(7, 7, 7), 0),
    "bits.png": (encoded(Image.new("1", (SIDE, SIDE), 1)), plain(255, 255, 255), 0),
    "alpha.png": (encoded(Image.new("RGBA", (SIDE, SIDE), (*BLUE, 51))), plain(204, 204, 255), 0),
}
"""What is in the file, the pixels that must come of it, and how far each may be off."""


def bomb(side: int = 100_000) -> bytes:
    """A PNG of some hundred bytes that says it is that wide and high."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 1000))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


BAD: dict[str, tuple[bytes, str]] = {
    "cut.jpg": (encoded(Image.fromarray(noise(99)), "JPEG", quality=95)[:-200], "truncated"),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"<html>404</html>" * 50, "not an image of a known format"),
    "bomb.png": (bomb(), "decompression bomb|more than PIL.Image.MAX_IMAGE_PIXELS"),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """16 good images in training, half of them odd, and four bad ones; four each to validate and test."""
    root = tmp_path / "photos"
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for number, name in enumerate(("odd", "plain")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(0 if (split, name) == ("train", "odd") else count):
                seed = 1000 * len(split) + 100 * number + index
                (folder / f"{index}.png").write_bytes(encoded(Image.fromarray(noise(seed))))
    for name, (data, *_) in (ODD | BAD).items():
        (root / "train" / "odd" / name).write_bytes(data)
    return root


class Recorded(CE):
    """Cross-entropy that notes which images came, and what was in them; `breaks` is done after the first step."""

    seen: list[tuple[int, Tensor]] = []  # noqa: RUF012
    breaks = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.needs = Needs(label=True)

    def forward(self, view: View) -> Tensor:
        data = view.batch["train"]
        Recorded.seen += zip(data["index"].tolist(), data["image"].detach().clone(), strict=True)
        Recorded.breaks()
        return super().forward(view)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "seen", [])
    monkeypatch.setattr(Recorded, "breaks", staticmethod(lambda: None))


def train(photos: Path, folder: Path, workers: int = 0, **arguments: Any) -> int:
    """Two epochs of all good images by the command line."""
    network = {"widths": [4], "in_channels": 3, "num_classes": 2}
    method = {"terms": {"ce": {"class_path": "test_images.Recorded"}}}
    config = {
        "data": {"class_path": "visiondistill.data.ImageFolder", "init_args": {"root": str(photos)} | arguments},
        "student": {"class_path": "visiondistill.models.SmallConvNet", "init_args": network},
        "method": {"class_path": "visiondistill.Distiller", "init_args": method},
        "steps": 2 * 16 // BATCH,
        "workers": workers,
        "run": {"output_dir": str(folder / "run"), "batch_size": BATCH, "device": "cpu", "proof_window": 0},
    }
    (folder / "recipe.yaml").write_text(recipes.dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return main(["train", "--recipe", str(folder / "recipe.yaml")])


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 1)])
def test_odd_ones_are_trained_on_as_they_look_and_bad_ones_never(
    in_memory: bool,
    workers: int,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="visiondistill"):
        assert train(photos, tmp_path, workers, in_memory=in_memory, max_bad_fraction=0.5) == 0
    said = capsys.readouterr().out
    assert "train: 16 used, 4 skipped, 0 doubled" in said
    assert "val: 4 used, 0 skipped" in said
    assert "steps: 8 (main), 2.0 epochs" in said

    # Each bad file is told of once, with its reason, and again in the account of the run.
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    account = json.loads((tmp_path / "run" / "preflight.json").read_text())["data"]["splits"]["train"]
    assert Counter(each["name"] for each in account["skipped"]) == Counter(
        str(photos / "train" / "odd" / name) for name in BAD
    )
    assert sorted(told) == sorted(f"left out {each['name']}: {each['reason']}" for each in account["skipped"])
    for each in account["skipped"]:
        assert re.search(BAD[Path(each["name"]).name][1], each["reason"]), each

    # 32 images in two epochs, each of the 16 once an epoch.
    index = [row for row, _ in Recorded.seen]
    assert [Counter(index[:16]), Counter(index[16:])] == [Counter(range(16))] * 2
    pixels = {row: (image * 255).round().to(torch.int64).permute(1, 2, 0).numpy() for row, image in Recorded.seen}
    listed = [*sorted(ODD), *(f"{i}.png" for i in range(8))]
    expected = {name: (values, off) for name, (_, values, off) in ODD.items()}
    expected |= {f"{i}.png": (noise(1000 * len("train") + 100 + i), 0) for i in range(8)}
    for row, name in enumerate(listed):
        values, off = expected[name]
        assert np.abs(pixels[row] - values.astype(int)).max() <= off, name


def test_too_many_bad_ones_end_the_command_with_their_list(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(photos, tmp_path) == 2
    said = capsys.readouterr().err
    assert "4 of 20 in train" in said
    assert "max_bad_fraction allows 0.001" in said
    for name in BAD:
        assert str(photos / "train" / "odd" / name) in said
    assert not (tmp_path / "run").exists()
    assert not Recorded.seen


@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_breaks_later_ends_the_run_with_its_name(
    workers: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    broken = photos / "train" / "plain" / "3.png"

    def breaks() -> None:
        broken.write_bytes(broken.read_bytes()[:50])

    monkeypatch.setattr(Recorded, "breaks", staticmethod(breaks))
    assert train(photos, tmp_path, workers, in_memory=False, max_bad_fraction=0.5) == 1
    said = capsys.readouterr().err
    assert f"{broken} could be read when it was listed, but now" in said
    # What came until then are images of the listing, none of them twice in its epoch, none in place of the broken one.
    index = [row for row, _ in Recorded.seen]
    assert 0 < len(index) < 32
    assert max(Counter(index[:16]).values()) == 1
    row = len(ODD) + 3
    whole = (torch.from_numpy(noise(1000 * len("train") + 103)).permute(2, 0, 1) / 255).float()
    assert all(torch.allclose(image, whole) for each, image in Recorded.seen if each == row)
    assert sum(torch.allclose(image, whole) for _, image in Recorded.seen) == index.count(row)
    assert not (tmp_path / "run" / "export").exists()
    # Workers that nobody ended would keep the interpreter from its exit: they ignore signals.
    assert not multiprocessing.active_children()
