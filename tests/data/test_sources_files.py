"""Sources of image files: folders, parquet, timm's listing."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiondistill.data import ImageFolder, Parquet, TensorData, TimmData, in_order
from visiondistill.data import encoded as encoded_module
from visiondistill.data.pixels import decode
from visiondistill.data.survey import Skipped
from visiondistill.engine.errors import SettingsError

ALONE = {"val_fraction": 0, "test_fraction": 0}


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def put(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path, "PNG")
    return path


def make(root: Path, splits: Sequence[str] = ("train", "val", "test"), classes: Sequence[str] = ("a", "b")) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for index in range(6):
                put(root / split / name / f"{index}.png", 1000 * s + 100 * c + index)
    return root


def listed(source: ImageFolder, split: str = "train") -> list[str]:
    data = getattr(source, split)()
    return [Path(data.files.name(row)).relative_to(data.files.root).as_posix() for row in data.rows]


def test_the_splits_are_the_folders(tmp_path: Path):
    source = ImageFolder(str(make(tmp_path)))
    assert source.splits == ("train", "val", "test")
    assert source.classes == ("a", "b")
    assert source.input_size == (3, 8, 8)
    expected = torch.stack([torch.from_numpy(np.array(picture(1100 + i))).permute(2, 0, 1) for i in range(6)])
    assert torch.equal(source.val().columns["image"][6:], expected)
    assert source.val().columns["label"].tolist() == [0] * 6 + [1] * 6
    assert not any(split.carved for split in source.describe().splits.values())


def test_classes_alone_are_carved(tmp_path: Path):
    source = ImageFolder(str(make(tmp_path, splits=("",))), in_memory=False, val_fraction=0.3, test_fraction=0.3)
    files = [listed(source, split) for split in ("train", "val", "test")]
    assert sorted(itertools.chain(*files)) == sorted(f"{c}/{i}.png" for c in "ab" for i in range(6))
    assert [len(each) for each in files] == [6, 2, 4]


def test_classes_and_files_come_in_the_order_of_code_points(tmp_path: Path):
    for name in ("b", "B", "a", "10", "9", "É", "Z"):
        put(tmp_path / name / "x.png")
    for name in ("10.png", "9.png", "B.png", "a.png", "sub/0.png", "Sub/0.png"):
        put(tmp_path / "a" / name)
    source = ImageFolder(str(tmp_path), in_memory=False, **ALONE)
    assert source.classes == ("10", "9", "B", "Z", "a", "b", "É")
    of_a = [name for name in listed(source) if name.startswith("a/")]
    assert of_a == ["a/10.png", "a/9.png", "a/B.png", "a/Sub/0.png", "a/a.png", "a/sub/0.png", "a/x.png"]


def test_what_is_listed_and_what_is_not(tmp_path: Path):
    for name in ("1.PNG", "2.JpG", "3.jpeg", "4.webp"):
        put(tmp_path / "a" / name)
    for name in (".hidden.png", "._1.png", ".cache/0.png"):
        put(tmp_path / "a" / name)
    put(tmp_path / ".git" / "0.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "README").write_text("x")
    source = ImageFolder(str(tmp_path), in_memory=False, **ALONE)
    assert listed(source) == ["a/1.PNG", "a/2.JpG", "a/3.jpeg", "a/4.webp"]
    assert source.describe().notes == ("train: 2 other files left out (1 .txt, 1 no extension)",)


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    put(tmp_path / "elsewhere" / "0.png", 1)
    put(tmp_path / "root" / "a" / "0.png", 2)
    (tmp_path / "root" / "a" / "link.png").symlink_to(tmp_path / "root" / "a" / "0.png")
    (tmp_path / "root" / "a" / "circle").symlink_to(tmp_path / "root" / "a")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(str(tmp_path / "root"), in_memory=False, **ALONE)
    assert listed(source) == ["a/0.png", "a/link.png", "b/0.png"]
    assert source.describe().splits["train"].doubled == 1


def test_names_are_compared_in_one_unicode_form(tmp_path: Path):
    put(tmp_path / "train" / "caf\u00e9" / "0.png")
    put(tmp_path / "test" / "cafe\u0301" / "1.png")
    assert ImageFolder(str(tmp_path), **ALONE).classes == ("caf\u00e9",)
    put(tmp_path / "train" / "cafe\u0301" / "0.png")
    with pytest.raises(SettingsError, match="different Unicode forms"):
        ImageFolder(str(tmp_path))


def test_a_class_may_be_called_train(tmp_path: Path):
    for name in ("bus", "car", "train"):
        put(tmp_path / name / "0.png")
    assert ImageFolder(str(tmp_path), **ALONE).classes == ("bus", "car", "train")


def test_classes_that_differ_between_splits_are_named(tmp_path: Path):
    make(tmp_path)
    put(tmp_path / "test" / "c" / "0.png")
    with pytest.raises(SettingsError, match=r"/test has 'c' besides$"):
        ImageFolder(str(tmp_path))
    (tmp_path / "train" / "d").mkdir()
    with pytest.raises(SettingsError, match=r"/val lacks 'd'$"):
        ImageFolder(str(tmp_path))


def test_the_order_of_classes_may_be_given_and_is_checked(tmp_path: Path):
    root = make(tmp_path)
    turned = ImageFolder(str(root), classes=["b", "a"])
    plain = ImageFolder(str(root))
    assert turned.classes == ("b", "a")
    assert torch.equal(turned.train().columns["image"][:6], plain.train().columns["image"][6:])
    assert turned.train().columns["label"].tolist() == [0] * 6 + [1] * 6
    with pytest.raises(SettingsError, match=r"compared with `classes`, .*/train lacks 'c' and has 'b' besides"):
        ImageFolder(str(root), classes=["a", "c"])
    with pytest.raises(SettingsError, match="twice"):
        ImageFolder(str(root), classes=["a", "b", "a"])


def test_folders_may_be_given_to_splits(tmp_path: Path):
    root = make(tmp_path, splits=("train", "val"))
    published = ImageFolder(str(root), splits={"train": "train", "test": "val"})
    assert torch.equal(published.test().columns["image"], ImageFolder(str(root)).val().columns["image"])
    assert published.describe().splits["val"].carved
    for wrong, named in [
        ({"train": "train", "test": "tset"}, r"no folder 'tset'; there are 'train', 'val'"),
        ({"test": "val"}, "must name a folder for train"),
        ({"train": "train", "dev": "val"}, "must name a folder"),
        ({"train": "train", "test": "train"}, "one folder cannot serve two splits"),
    ]:
        with pytest.raises(SettingsError, match=named):
            ImageFolder(str(root), splits=wrong)


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (lambda root: None, "has no folder per class"),
        (lambda root: put(root / "0.png"), "has no folder per class"),
        (lambda root: make(root, splits=("val", "test")), "none for train"),
        (lambda root: make(root, splits=("train", "val", "validation")), "val and validation: say which"),
        (
            lambda root: (make(root), (root / "train" / "b" / "x").mkdir(), empty(root / "train" / "b")),
            "no image of 'b'",
        ),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path: Path, prepare, named: str):
    prepare(tmp_path)
    with pytest.raises(SettingsError, match=named):
        ImageFolder(str(tmp_path))
    with pytest.raises(SettingsError, match="is not a folder"):
        ImageFolder(str(tmp_path / "nowhere"))


def empty(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.unlink()


def test_one_size_is_kept_and_others_are_cut(tmp_path: Path):
    root = make(tmp_path)
    assert ImageFolder(str(root)).input_size == (3, 8, 8)
    put(root / "train" / "a" / "0.png", 0, (12, 9))
    source = ImageFolder(str(root))
    assert source.input_size == (3, 224, 224)
    assert "2 sizes" in source.describe().notes[0]
    assert source.train().columns["image"].shape[1:] == (3, 224, 224)
    assert ImageFolder(str(root), size=6, channels=1).train().columns["image"].shape == (12, 1, 6, 6)


@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_same_in_memory_and_from_the_disk(tmp_path: Path, size: int | None, channels: int):
    options = {"size": size, "channels": channels}
    kept = ImageFolder(str(make(tmp_path)), in_memory=True, **options)
    read = ImageFolder(str(tmp_path), in_memory=False, **options)
    assert isinstance(kept.test(), TensorData)
    assert not isinstance(read.test(), TensorData)
    for ours, theirs in zip(in_order(kept.test(), 5), in_order(read.test(), 5), strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])
    ours, theirs = (next(source.stream(4).open(3, [(0, 4)], seed=1))[0] for source in (kept, read))
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["index"], theirs["index"])


def test_sets_above_the_limit_stay_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, total = str(make(tmp_path)), 36 * 3 * 8 * 8
    for limit, held in [(total, True), (total - 1, False)]:
        monkeypatch.setattr(encoded_module, "MEMORY_BYTES", limit)
        assert ImageFolder(root).describe().in_memory is held
        assert ImageFolder(root, size=8).describe().in_memory is held


def test_random_crops_train_and_fixed_ones_evaluate(tmp_path: Path):
    source = ImageFolder(str(make(tmp_path)), size=6, random_crop=0.3)
    fixed = ImageFolder(str(tmp_path), size=6)
    assert torch.equal(
        torch.cat([batch["image"] for batch in in_order(source.train(), 4)]),
        torch.cat([batch["image"] for batch in in_order(fixed.train(), 4)]),
    )
    epochs = [next(source.stream(12).open(step, [(0, 12)], seed=0))[0] for step in (0, 1)]
    first, second = (batch["image"][batch["index"].argsort()] for batch in epochs)
    assert first.shape == (12, 3, 6, 6)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    again = next(source.stream(12).open(1, [(0, 12)], seed=0))[0]
    assert torch.equal(again["image"], epochs[1]["image"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"channels": 2},
        {"crop_pct": 0.0},
        {"interpolation": "nearest"},
        {"random_crop": 1.5},
        {"flip": 2.0},
        {"max_bad_fraction": -1},
        {"in_memory": True, "random_crop": 0.5},
        {"val_fraction": 1.0},
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, wrong: dict):
    if "val_fraction" in wrong:
        make(tmp_path, splits=("train", "test"))
    else:
        make(tmp_path)
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        ImageFolder(str(tmp_path), **wrong)


# parquet


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    picture(seed, size).save(file, "PNG")
    return file.getvalue()


def write(path: Path, images: Sequence, labels: Sequence, names: Sequence[str] | None = None, groups: int = 4) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if all(isinstance(each, bytes) for each in images):
        images = [{"bytes": each, "path": f"{n}.jpg"} for n, each in enumerate(images)]
    table = pa.table({"image": images, "label": labels})
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups)


def hub(root: Path, names: Sequence[str] = ("cat", "dog", "bird")) -> Path:
    write(root / "train-00000-of-00002.parquet", [png(i) for i in range(10)], [i % 3 for i in range(10)], names)
    write(root / "train-00001-of-00002.parquet", [png(i) for i in range(10, 17)], [i % 3 for i in range(10, 17)], names)
    write(root / "validation-00000-of-00001.parquet", [png(i) for i in range(50, 56)], [0, 1, 2] * 2, names)
    write(root / "test-00000-of-00001.parquet", [png(i) for i in range(90, 93)], [2, 1, 0], names)
    return root


@pytest.mark.parametrize("in_memory", [True, False])
def test_parquet_rows_keep_their_order_labels_and_names(tmp_path: Path, in_memory: bool):
    source = Parquet(str(hub(tmp_path)), in_memory=in_memory)
    assert source.classes == ("cat", "dog", "bird")
    assert source.splits == ("train", "val", "test")
    images = torch.cat([batch["image"] for batch in in_order(source.train(), 5)])
    expected = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) for i in range(17)]).float() / 255
    assert torch.equal(images, expected)
    assert torch.cat([b["label"] for b in in_order(source.train(), 5)]).tolist() == [i % 3 for i in range(17)]
    assert [len(part) for part in (source.val(), source.test())] == [6, 3]


def test_parquet_reads_by_row_group_and_travels_to_workers(tmp_path: Path):
    source = Parquet(str(hub(tmp_path)), in_memory=False)
    files = source.train().files
    assert [number for _, number in files.groups] == [0, 1, 2, 0, 1]
    assert files.starts.tolist() == [0, 4, 8, 10, 14, 17]
    sent = pickle.loads(pickle.dumps(source.train()))
    assert not sent.files._read
    for index in (16, 0, 9):
        assert np.array_equal(np.asarray(sent[index]["image"]), np.asarray(picture(index)))


def test_parquet_in_the_data_folder_or_one_file(tmp_path: Path):
    hub(tmp_path / "data")
    assert Parquet(str(tmp_path)).splits == ("train", "val", "test")
    single = Parquet(str(tmp_path / "data" / "train-00000-of-00002.parquet"))
    assert single.describe().splits["test"].carved
    named = Parquet(str(tmp_path), splits={"train": "train", "test": "validation"})
    assert len(named.test()) == 6
    assert named.describe().splits["val"].carved


def test_parquet_shards_that_are_missing_are_said(tmp_path: Path):
    hub(tmp_path)
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    assert Parquet(str(tmp_path)).describe().notes == ("train: 1 of 2 shards are here",)


def test_parquet_labels_as_text_bare_numbers_or_missing(tmp_path: Path):
    write(tmp_path / "text.parquet", [png(i) for i in range(4)], ["b", "a", "B", None])
    text = Parquet(str(tmp_path / "text.parquet"), **ALONE)
    assert text.classes == ("B", "a", "b")
    assert text.train().columns["label"].tolist() == [2, 1, 0, -1]
    assert text.stream(2).labelled_fraction == 0.75
    turned = Parquet(str(tmp_path / "text.parquet"), classes=["a", "b", "B"], **ALONE)
    assert turned.train().columns["label"].tolist() == [1, 0, 2, -1]
    write(tmp_path / "bare.parquet", [png(i) for i in range(3)], [0, 2, 2])
    assert Parquet(str(tmp_path / "bare.parquet"), **ALONE).classes == ("0", "1", "2")
    assert Parquet(str(tmp_path / "bare.parquet"), classes=["x", "y", "z"], **ALONE).classes == ("x", "y", "z")


def test_parquet_images_may_be_bytes_alone(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"img": [png(0), png(1)], "y": [0, 1]}), tmp_path / "x.parquet")
    source = Parquet(str(tmp_path / "x.parquet"), image="img", label="y", **ALONE)
    assert source.describe().splits["train"].used == 2


def test_bad_parquet_rows_are_left_out_and_named(tmp_path: Path):
    rows = [png(0), b"", png(2)[:60], png(3)]
    images = [{"bytes": row, "path": f"{n}.jpg"} for n, row in enumerate(rows)] + [{"bytes": None, "path": "4.jpg"}]
    write(tmp_path / "x.parquet", images, [0, 1, 1, 1, 0], groups=2)
    source = Parquet(str(tmp_path / "x.parquet"), max_bad_fraction=0.6, **ALONE)
    assert source.train().columns["label"].tolist() == [0, 1]
    skipped = source.describe().splits["train"].skipped
    where = tmp_path / "x.parquet"
    assert skipped[0] == Skipped(f"{where}, row 1 (1.jpg)", "the file is empty")
    assert [each.name for each in skipped] == [f"{where}, row {n} ({n}.jpg)" for n in (1, 2, 4)]
    with pytest.raises(SettingsError, match="3 of 5 in train"):
        Parquet(str(where), **ALONE)


@pytest.mark.parametrize(
    ("prepare", "arguments", "named"),
    [
        (lambda root: None, {}, "has no parquet file"),
        (lambda root: (root / "train.parquet").write_bytes(b"PAR1"), {}, "not a readable parquet file"),
        (
            lambda root: write(root / "test.parquet", [png(0)], [0]),
            {},
            r"no parquet file of train; there are test\.parquet",
        ),
        (hub, {"image": "img"}, "no column 'img'; there are image, label"),
        (hub, {"label": "fine"}, "no column 'fine'; there are image, label"),
        (hub, {"classes": ["a", "b"]}, "must have 3 names"),
        (hub, {"splits": {"test": "test"}}, "must say how files of train begin"),
        (hub, {"splits": {"train": "train", "test": "dev"}}, "no parquet file of test"),
        (hub, {"splits": {"train": "train", "test": "t"}}, "one file cannot serve two splits"),
        (lambda root: write(root / "train.parquet", [png(0)], [7], ["a", "b"]), {}, "labels of train are 7 to 7"),
        (lambda root: write(root / "train.parquet", [png(0)], [0.5]), {}, "integers or text, got float"),
    ],
)
def test_parquet_that_does_not_fit_is_named(tmp_path: Path, prepare, arguments: dict, named: str):
    pytest.importorskip("pyarrow")
    prepare(tmp_path)
    with pytest.raises(SettingsError, match=named):
        Parquet(str(tmp_path), **arguments)


def test_parquet_class_names_that_differ_are_named(tmp_path: Path):
    hub(tmp_path)
    write(tmp_path / "test-00000-of-00001.parquet", [png(0)], [0], ("cat", "dog", "cow"))
    with pytest.raises(SettingsError, match=r"between train and test: \['bird', 'cow'\]"):
        Parquet(str(tmp_path))
    write(tmp_path / "test-00000-of-00001.parquet", [png(0)], [0], ("dog", "cat", "bird"))
    with pytest.raises(SettingsError, match="the same in another order"):
        Parquet(str(tmp_path))


def shared(shared_dir: Path, name: str) -> str:
    pytest.importorskip("pyarrow")
    if not (shared_dir / "data" / name).is_dir():
        pytest.skip(f"no {name} in {shared_dir / 'data'}")
    return str(shared_dir / "data" / name)


def test_caltech_is_read_as_described(shared_dir: Path):
    source = Parquet(shared(shared_dir, "caltech101_128"))
    account = source.describe()
    assert len(account.classes) == 101
    assert account.input_size == (3, 128, 128)
    assert account.in_memory
    counts = {name: split.used for name, split in account.splits.items()}
    assert counts["train"] + counts["val"] == 2959
    assert counts["test"] == 1763
    assert min(account.splits["val"].per_class) >= 1
    assert not any(split.skipped for split in account.splits.values())
    assert account.splits["test"].in_train == 0


def test_cifar10_pixels_are_those_of_the_set(shared_dir: Path):
    source = Parquet(shared(shared_dir, "cifar10"), splits={"train": "test"}, **ALONE)
    images = source.train().columns["image"]
    assert images.shape == (10_000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert source.train().columns["label"].bincount().tolist() == [1000] * 10
    first = decode(source_bytes(shared(shared_dir, "cifar10")), 3)
    assert torch.equal(images[0], torch.from_numpy(np.array(first)).permute(2, 0, 1))
    # The published channel means of the training set, which the test set's come near.
    mean = images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), rtol=0, atol=0.006)


def source_bytes(folder: str) -> bytes:
    import pyarrow.parquet as pq

    return pq.read_table(f"{folder}/test-00000-of-00001.parquet").column("image")[0].as_py()["bytes"]


# timm


def test_timm_folders_keep_timms_order_and_our_pixels(tmp_path: Path):
    make(tmp_path, splits=("train", "val"), classes=("10", "9", "a"))
    timms, ours = TimmData(root=str(tmp_path)), ImageFolder(str(tmp_path))
    assert timms.classes == ("9", "10", "a")
    assert ours.classes == ("10", "9", "a")
    assert timms.splits == ("train", "val", "test")
    reordered = ImageFolder(str(tmp_path), classes=["9", "10", "a"])
    for name in ("train", "val", "test"):
        a, b = (getattr(source, name)().columns for source in (timms, reordered))
        assert sorted(zip(a["label"].tolist(), pixels_of(a), strict=True)) == sorted(
            zip(b["label"].tolist(), pixels_of(b), strict=True)
        )


def pixels_of(columns: dict) -> list[bytes]:
    return [image.numpy().tobytes() for image in columns["image"]]


def test_timm_gives_no_neighbour_for_a_bad_file(tmp_path: Path):
    make(tmp_path, splits=("train", "val"))
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(SettingsError, match="1 of 12 in train"):
        TimmData(root=str(tmp_path))
    source = TimmData(root=str(tmp_path), max_bad_fraction=0.1, in_memory=False, test_fraction=0)
    assert len(source.train()) == 11
    batches = list(in_order(source.train(), 4))
    assert sum(len(batch["label"]) for batch in batches) == 11


def test_timm_reads_tar_files(tmp_path: Path):
    import tarfile

    make(tmp_path / "plain", splits=("",))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "plain", arcname="")
    source = TimmData(root=str(tmp_path / "set.tar"), splits={"train": "train"}, in_memory=False, **ALONE)
    assert source.classes == ("a", "b")
    assert len(source.train()) == 12
    plain = ImageFolder(str(tmp_path / "plain"), **ALONE)
    # An open tar file could not go to a worker.
    sent = pickle.loads(pickle.dumps(source.train()))
    images = torch.cat([batch["image"] for batch in in_order(sent, 5)])
    assert torch.equal(images, plain.train().columns["image"].float() / 255)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "torch/cifar10"}, "data.Torchvision"),
        ({"splits": {"train": "train", "test": "test"}}, "is in test and in train"),
        ({"splits": {"test": "val"}}, "must name train"),
        ({"root": "nowhere"}, "cannot list 'nowhere'"),
    ],
)
def test_timm_sets_that_do_not_fit_are_refused(tmp_path: Path, arguments: dict, named: str):
    make(tmp_path, splits=("",))
    with pytest.raises(SettingsError, match=named):
        TimmData(**{"root": str(tmp_path)} | arguments)
