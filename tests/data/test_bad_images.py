"""What pixels are read from odd files, and what becomes of bad ones."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from visiondistill.data import ImageFolder, Stream, in_order
from visiondistill.data.pixels import decode
from visiondistill.data.samples import to_image
from visiondistill.engine.errors import SettingsError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode(data, channels))


def corners() -> Image.Image:
    """3 wide, 2 high: red at the top left, green at the top right, blue at the bottom left, the rest white."""
    image = Image.new("RGB", (3, 2), WHITE)
    image.putpixel((0, 0), RED), image.putpixel((2, 0), GREEN), image.putpixel((0, 1), BLUE)
    return image


def noisy(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, -1),
}
"""How each EXIF orientation stores an upright picture."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_comes_out_upright(orientation: int, kind: str):
    upright = np.kron(np.asarray(corners()), np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    out = pixels(encoded(stored, kind, exif=exif, **options))
    assert out.shape == upright.shape
    assert np.abs(out.astype(int) - upright).mean() < 3


def test_transparency_lies_on_white_however_it_is_stored():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 255, 51))
    expected = [[[255, 255, 255], [204, 204, 255]]]
    assert pixels(encoded(half)).tolist() == expected
    assert pixels(encoded(half, "WEBP", lossless=True, exact=True)).tolist() == expected
    grey = Image.new("LA", (1, 1), (0, 51))
    assert pixels(encoded(grey)).tolist() == [[[204, 204, 204]]]
    assert pixels(encoded(grey), 1).tolist() == [[204]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(palette, kind, transparency=0)).tolist() == [[[255, 255, 255], [0, 255, 0]]]
        assert pixels(encoded(palette, kind)).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    key = Image.new("RGB", (1, 1), (9, 9, 9))
    assert pixels(encoded(key, transparency=(9, 9, 9))).tolist() == [[[255, 255, 255]]]


def test_the_users_own_pictures_follow_the_same_rule():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_image(half).flatten().tolist() == [1, 1, 1]


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 257, 32896, 65535, 1000]], dtype=np.uint16)
    expected = [0, 1, 128, 255, 4]
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(Image.fromarray(values), kind), 1).tolist() == [expected]
    assert pixels(encoded(Image.fromarray(values))).tolist() == [[[v] * 3 for v in expected]]
    big = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    assert pixels(big, 1).tolist() == [expected]


def test_sixteen_bit_colours_are_right_within_one_step():
    values = np.array([[[0, 32896, 65535]]], dtype=">u2")
    raw = b"\x00" + values.tobytes()
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert np.abs(pixels(png).astype(int) - [[[0, 128, 255]]]).max() <= 1


def test_print_colours_become_screen_colours():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(pixels(encoded(ink, kind)).astype(int) - RED).max() <= 4


def test_grey_and_colour_become_what_is_asked():
    assert pixels(encoded(Image.new("L", (2, 1), 7))).tolist() == [[[7, 7, 7]] * 2]
    assert pixels(encoded(Image.new("1", (1, 1), 1))).tolist() == [[[255, 255, 255]]]
    # ITU-R 601 luma, 16.16 fixed point in PIL.
    assert pixels(encoded(Image.new("RGB", (1, 1), GREEN)), 1).tolist() == [[150]]


def test_animations_give_their_first_picture():
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    for kind, options in {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}}.items():
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data).tolist() == [[list(RED)] * 2] * 2, kind


BAD = {
    "empty": (b"", "empty"),
    "text": (b"<html>404</html>" * 100, "not an image of a known format"),
    "pdf": (b"%PDF-1.7\n" + b"0" * 5000, "not an image of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n" + b"0" * 500, "not an image"),
    "cut jpeg": (encoded(noisy(), "JPEG")[:-200], "truncated"),
    "cut png": (encoded(noisy())[:-200], "truncated|broken"),
    "cut webp": (encoded(noisy(), "WEBP")[:-100], "."),
    "cut gif": (encoded(noisy(), "GIF")[:300], "."),
    "header alone": (encoded(noisy(), "JPEG")[:20], "."),
    "float": (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "32-bit"),
    "int32": (encoded(Image.fromarray(np.zeros((2, 2), np.int32)), "TIFF"), "32-bit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_says_why(name: str):
    data, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    data = encoded(Image.new("1", (400, 400)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match=r"400x400 pixels are more than"):
        decode(data)


def test_pil_set_to_forgive_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded(noisy()))


def make_folder(root: Path, count: int = 12) -> Path:
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                seed = hash_of(split, number, index)
                noisy(seed, (16, 16)).save(root / split / name / f"{index:02}.png")
    return root


def hash_of(split: str, number: int, index: int) -> int:
    return 1000 * ("train", "test").index(split) + 100 * number + index


def test_bad_files_are_left_out_before_epochs_are_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = make_folder(tmp_path)
    clean = ImageFolder(str(root), val_fraction=0)
    for number, (data, _) in enumerate(BAD.values()):
        (root / "train" / "cat" / f"bad{number}.jpg").write_bytes(data)
    (root / "train" / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    with caplog.at_level(logging.WARNING, logger="visiondistill"):
        source = ImageFolder(str(root), val_fraction=0, max_bad_fraction=0.5)
    account = source.describe().splits["train"]
    assert account.used == 24
    assert len(account.skipped) == len(BAD) + 1
    assert {Path(each.name).name for each in account.skipped} == {f"bad{n}.jpg" for n in range(len(BAD))} | {"gone.png"}
    said = [record.getMessage() for record in caplog.records]
    assert sorted(said) == sorted(f"left out {each.name}: {each.reason}" for each in account.skipped)
    # The others are those of the folder without bad files, each once an epoch.
    assert torch.equal(source.train().columns["image"], clean.train().columns["image"])
    batch = next(source.stream(24).open(0, [(0, 24)], seed=0))[0]
    assert sorted(batch["index"].tolist()) == list(range(24))


def test_too_many_bad_files_are_an_error_that_names_them(tmp_path: Path):
    root = make_folder(tmp_path)
    (root / "train" / "cat" / "00.png").write_bytes(b"")
    (root / "test" / "dog" / "07.png").write_bytes(b"GIF89a")
    with pytest.raises(SettingsError, match=r"1 of 24 in train, 1 of 24 in test") as refusal:
        ImageFolder(str(root))
    assert str(root / "train" / "cat" / "00.png") in str(refusal.value)
    assert str(root / "test" / "dog" / "07.png") in str(refusal.value)
    assert ImageFolder(str(root), max_bad_fraction=1 / 24).describe().splits["test"].used == 23


def test_a_long_list_of_bad_files_is_cut(tmp_path: Path):
    root = make_folder(tmp_path, count=30)
    for path in (root / "train" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SettingsError, match=r"30 of 60 in train.*\n(.*\n){20}  \.\.\. and 10 more"):
        ImageFolder(str(root))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_stops_the_run_and_is_named(tmp_path: Path, workers: int):
    root = make_folder(tmp_path)
    source = ImageFolder(str(root), in_memory=False, val_fraction=0)
    broken = root / "train" / "dog" / "03.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"dog/03\.png could be read when it was listed, but now"):
        list(in_order(source.train(), 8, workers))


def test_pictures_travel_to_workers(tmp_path: Path):
    source = ImageFolder(str(make_folder(tmp_path)), in_memory=False)
    copy = pickle.loads(pickle.dumps(source.train()))
    assert isinstance(source.stream(4), Stream)
    assert np.array_equal(np.asarray(copy[3]["image"]), np.asarray(source.train()[3]["image"]))
