"""Sets as they come: odd names and layouts, splits without labels, files that are not what they say, and changes."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiondistill import Distiller, Run, Stage, train
from visiondistill.data import ImageFolder, OwnData, Parquet, Source, TensorData
from visiondistill.data.pixels import decode
from visiondistill.engine.errors import ResumeError, SettingsError
from visiondistill.models import SmallConvNet
from visiondistill.terms import CE

ALONE = {"val_fraction": 0, "test_fraction": 0}


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(path: Path, seed: int, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed), kind))


def make(root: Path, splits: Sequence[str], classes: Sequence[str] = ("a", "b")) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for index in range(6):
                put(root / split / name / f"{index}.png", 1000 * s + 100 * c + index)
    return root


def shards(root: Path, *names: str, labels: Sequence = (0, 1, 0, 1, 0, 1), label: str = "label") -> Path:
    """Parquet files as the hub's library writes them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {label: {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images = [
            {"bytes": encoded(picture(100 * number + index)), "path": f"{index}.png"} for index in range(len(labels))
        ]
        pq.write_table(pa.table({"image": images, label: list(labels)}).replace_schema_metadata(told), root / name)
    return root


# folders


def test_the_case_of_a_splits_folder_does_not_matter(tmp_path: Path):
    source = ImageFolder(str(make(tmp_path, ("Train", "TEST"))))
    assert source.classes == ("a", "b")
    accounts = source.describe().splits
    assert (accounts["test"].used, accounts["test"].carved, accounts["val"].carved) == (12, False, True)


def test_folders_beside_the_splits_are_said(tmp_path: Path):
    make(tmp_path, ("train", "extra"))
    for index in range(3):
        put(tmp_path / "test" / f"{index}.png", index)
    source = ImageFolder(str(tmp_path))
    assert source.describe().splits["test"].carved
    assert source.describe().notes == ("left out beside 'train': 'extra', 'test', no split or without classes",)
    named = ImageFolder(str(tmp_path), splits={"train": "train", "test": "extra"})
    assert named.describe().notes == ("left out beside 'extra', 'train': 'test', no split or without classes",)
    assert ImageFolder(str(tmp_path / "train")).describe().notes == ()


def test_what_a_file_is_called_does_not_matter(tmp_path: Path):
    for index, (name, kind) in enumerate([("0.jpg", "PNG"), ("1.png", "BMP"), ("2.gif", "WEBP"), ("3.tif", "PPM")]):
        put(tmp_path / "a" / name, index, kind)
    (tmp_path / "a" / "4.jpg").write_text("<html>not found</html>")
    with pytest.raises(SettingsError, match=r"a/4\.jpg: not an image of a known format"):
        ImageFolder(str(tmp_path), **ALONE)
    source = ImageFolder(str(tmp_path), max_bad_fraction=0.2, **ALONE)
    assert source.describe().splits["train"].used == 4


# files


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def jpeg_of(side: int) -> bytes:
    data = bytearray(encoded(picture(0), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", side, side)
    return bytes(data)


SIDE = 100_000
BOMBS = {
    "png": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(100)))
    + chunk(b"IEND", b""),
    "ppm": b"P6 %d %d 255\n" % (SIDE, SIDE) + bytes(100),
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, SIDE, SIDE, 1, 24, *[0] * 6) + bytes(100),
    "gif": b"GIF89a" + struct.pack("<HHxxx", 65535, 65535) + b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + bytes(9),
    "jpeg": jpeg_of(65000),
}
"""Headers of pictures that would take 12 to 30 GB."""


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_of_ten_billion_pixels_is_refused_at_once(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"pixels\) exceeds limit"):
        decode(BOMBS[kind])


def test_such_a_file_is_one_bad_file_of_a_set(tmp_path: Path):
    make(tmp_path, ("",))
    (tmp_path / "a" / "huge.png").write_bytes(BOMBS["png"])
    skipped = ImageFolder(str(tmp_path), max_bad_fraction=0.1).describe().splits["train"].skipped
    assert [Path(each.name).name for each in skipped] == ["huge.png"]


def test_pictures_of_phones_with_a_second_picture_inside_give_the_first():
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(np.asarray(decode(data)).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_all_kinds_of_pixels_are_one_kind_in_a_set(tmp_path: Path, mode: str):
    """White, in every mode that files have, beside an ordinary picture."""
    white = Image.fromarray(np.full((8, 8), 65535, np.uint16)) if mode == "I;16" else None
    if mode == "PA":
        white = Image.new("RGBA", (8, 8), "white").convert("PA")
    white = white or Image.new("RGB", (8, 8), "white").convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "PA") else "PNG"
    try:
        data = encoded(white, kind)
    except OSError:
        pytest.skip(f"PIL writes no file of mode {mode}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(data)
    put(tmp_path / "a" / "1.png", 1)
    for channels in (1, 3):
        images = ImageFolder(str(tmp_path), channels=channels, **ALONE).train().columns["image"]
        assert images.shape == (2, channels, 8, 8)
        assert images.dtype == torch.uint8
        assert images[0].min() >= 254


# layouts of the hub


@pytest.mark.parametrize(
    "files",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train-00000-of-00001-5f1b.parquet", "test-00000-of-00001-0c3d.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("train.parquet", "test.parquet"),
    ],
)
def test_every_layout_of_the_hub_is_the_same_set(tmp_path: Path, files: tuple[str, str]):
    source = Parquet(str(shards(tmp_path, *files)))
    assert source.classes == ("cat", "dog")
    accounts = source.describe().splits
    assert [accounts[name].carved for name in ("train", "val", "test")] == [False, True, False]
    expected = torch.stack([torch.from_numpy(np.array(picture(100 + i))).permute(2, 0, 1) for i in range(6)])
    assert torch.equal(source.test().columns["image"], expected)
    named = Parquet(str(tmp_path), splits={"train": "test", "test": "train"})
    assert len(named.test()) == 6


@pytest.mark.parametrize("file", ["plain_text/train-00000-of-00001.parquet", "plain_text/train/0000.parquet"])
def test_a_folder_above_the_set_says_where_it_is(tmp_path: Path, file: str):
    shards(tmp_path, file)
    with pytest.raises(SettingsError, match=r"there are some in \S+/plain_text: name one$"):
        Parquet(str(tmp_path))
    assert Parquet(str(tmp_path / "plain_text")).classes == ("cat", "dog")


def test_a_column_of_labels_with_another_name_keeps_its_class_names(tmp_path: Path):
    shards(tmp_path, "train-00000-of-00001.parquet", label="fine_label")
    with pytest.raises(SettingsError, match="no column 'label'; there are image, fine_label"):
        Parquet(str(tmp_path))
    assert Parquet(str(tmp_path), label="fine_label").classes == ("cat", "dog")


# splits without labels


def hidden(root: Path) -> Source:
    shards(root, "train-00000-of-00001.parquet")
    shards(root, "test-00000-of-00001.parquet", labels=[-1] * 6)
    return Parquet(str(root))


def own(root: Path) -> Source:
    image = torch.rand(6, 1, 4, 4)
    return OwnData(
        TensorData({"image": image, "label": torch.arange(6) % 2}),
        test=TensorData({"image": image, "label": torch.full((6,), -1)}),
    )


@pytest.mark.parametrize("make_source", [hidden, own])
def test_a_test_split_without_labels_is_refused_before_the_training(
    tmp_path: Path, make_source: Callable[[Path], Source]
):
    with pytest.raises(SettingsError, match="none of the 6 test images has a label"):
        make_source(tmp_path)


def test_it_can_be_left_out(tmp_path: Path):
    with pytest.raises(SettingsError):
        hidden(tmp_path)
    source = Parquet(str(tmp_path), splits={"train": "train"}, val_fraction=0)
    assert source.describe().splits["test"].carved


# the same set tomorrow


def play(root: Path, folder: Path, resume: str = "none", **reading) -> None:
    torch.manual_seed(0)
    source = ImageFolder(str(root), **reading)
    student = SmallConvNet([4], in_channels=3, num_classes=2)
    method = Distiller(student=student, terms={"ce": CE()}, streams={"train": source.stream(4)})
    settings = {"device": "cpu", "progress": False, "proof_window": 0, "checkpoint_every": 2}
    train([Stage(method, 4)], Run(str(folder), batch_size=4, resume=resume, **settings))


def one_more(root: Path) -> None:
    put(root / "train" / "a" / "new.png", 99)


def another_picture(root: Path) -> None:
    put(root / "train" / "a" / "0.png", 99)


def another_class(root: Path) -> None:
    (root / "train" / "a" / "0.png").rename(root / "train" / "b" / "moved.png")


def another_name(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / "A")


@pytest.mark.parametrize("change", [one_more, another_picture, another_class, another_name])
def test_a_run_does_not_go_on_with_other_images(tmp_path: Path, change: Callable[[Path], None]):
    root = make(tmp_path / "set", ("train", "test"))
    play(root, tmp_path / "run")
    change(root)
    with pytest.raises(ResumeError, match=r"streams\.train\.(contents|samples)"):
        play(root, tmp_path / "again", resume=str(tmp_path / "run" / "checkpoints" / "step_000000002"))


def test_a_run_does_not_go_on_with_other_views_of_them(tmp_path: Path):
    root = make(tmp_path / "set", ("train", "test"))
    play(root, tmp_path / "run", size=6, random_crop=0.5)
    half = str(tmp_path / "run" / "checkpoints" / "step_000000002")
    with pytest.raises(ResumeError, match=r"streams\.train\.contents"):
        play(root, tmp_path / "again", resume=half, size=6, random_crop=0.4)
    play(root, tmp_path / "same", resume=half, size=6, random_crop=0.5)


def test_where_the_images_lie_and_how_they_are_held_may_change(tmp_path: Path):
    root = make(tmp_path / "set", ("train", "test"))
    play(root, tmp_path / "run", in_memory=True)
    put(root / "test" / "a" / "new.png", 99)
    root = root.rename(tmp_path / "moved")
    half = str(tmp_path / "run" / "checkpoints" / "step_000000002")
    play(root, tmp_path / "again", resume=half, in_memory=False, max_bad_fraction=0.5)
