"""Stored logits reach the images that they were made for, mirrored or not; whatever else is asked is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import distiller, images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visiondistill import Distiller, cli, recipes, workbench
from visiondistill.augmentors import AffineRange, Augment, Chain, Hard, Mix
from visiondistill.data import ImageFolder, OwnData, Pruned, Source, Stream, TensorData
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.rng import Draw, key
from visiondistill.models import Network, SmallConvNet
from visiondistill.parts import Part
from visiondistill.teachers import LiveTeacher, Stored, store_targets
from visiondistill.terms import CE, KL, Hint

COUNT, CLASSES = 60, 3


class Corner(nn.Module):
    """Logits by which image and mirror image are known: pixels of the left edge, whose sum is the same in no other."""

    num_classes = CLASSES

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, :CLASSES, 0] * 20


def pictures(count: int = COUNT, seed: int = 0) -> TensorData:
    """Noise in eighths, exact in fp16; the brightest of three pixels at the left edge is the label."""
    image = torch.randint(0, 7, (count, 1, 6, 6), generator=torch.Generator().manual_seed(seed)) / 8
    label = torch.arange(count) % CLASSES
    image[torch.arange(count), 0, label, 0] = 1.0
    return TensorData({"image": image, "label": label})


def source(data: TensorData | None = None, **options) -> Source:
    return OwnData(data or pictures(), **options)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "deep" / "teacher.safetensors"
    assert store_targets(Corner(), source(), path, teacher="corner") == COUNT
    return str(path)


def method(file: str, data: Source | Stream, augmentor: Part | None = None, **parts) -> Distiller:
    stream = data if isinstance(data, Stream) else data.stream(8)
    student = Network(SmallConvNet((4,), num_classes=CLASSES), input_size=(1, 6, 6))
    given = {"teacher": Stored(file), "terms": {"ce": CE(), "kd": KL()}} | parts
    return Distiller(student=student, streams={"train": stream}, augmentor=augmentor, **given)


def prepared(built: Distiller, step: int) -> dict:
    (data,) = next(built.streams["train"].open(step, [(0, 8)], key(0, "train")))
    draw = Draw(0, step, {"": (0, 8), "train": (0, 8)}, 8, torch.device("cpu"), torch.float32)
    return built.prepare({"train": data}, draw, frozenset({"student"}))


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_its_answers_are_those_of_the_network_to_what_the_student_sees(file: str, flip: float) -> None:
    """Over an epoch and more, of what carving and pruning have left."""
    for data in (source(), source(split_seed=3), Pruned(source(), 0.5), source(val_fraction=0, test_fraction=0)):
        built = method(file, data, Augment(flip=flip))
        mirrored = set()
        for step in range(9):
            batch = prepared(built, step)
            torch.testing.assert_close(batch["teacher"]["logits"], Corner()(batch["train"]["image"]), rtol=0, atol=0)
            mirrored |= set(batch["train"]["view"].get("flip", torch.zeros(1, dtype=torch.bool)).tolist())
        assert mirrored == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[flip]


def test_without_an_augmentor_images_are_plain(file: str) -> None:
    batch = prepared(method(file, source()), 0)
    torch.testing.assert_close(batch["teacher"]["logits"], Corner()(batch["train"]["image"]))


def test_files_that_cannot_be_read_keep_their_number(tmp_path: Path) -> None:
    """And a run through workers is taught the same as one in memory."""
    data = pictures()
    for row, (image, label) in enumerate(zip(data.columns["image"], data.columns["label"], strict=True)):
        folder = tmp_path / "photos" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{row:03}.png")
    path = tmp_path / "teacher.safetensors"
    settings = {"channels": 1, "crop_pct": 1.0, "max_bad_fraction": 1.0}
    (tmp_path / "photos" / "0" / "003.png").write_bytes(b"no image")
    (tmp_path / "photos" / "1" / "010.png").write_bytes(b"no image")
    assert store_targets(Corner(), ImageFolder(str(tmp_path / "photos"), **settings), path) == COUNT - 2
    with safe_open(path, "pt") as opened:
        missing = opened.get_tensor("train_logits").isnan().all(2).nonzero()
    assert missing.tolist() == [[0, 1], [0, 23], [1, 1], [1, 23]], "as listed, class by class"
    for held in (True, False):
        photos = ImageFolder(str(tmp_path / "photos"), in_memory=held, **settings)
        built = method(str(path), photos)
        for step in range(7):
            batch = prepared(built, step)
            torch.testing.assert_close(batch["teacher"]["logits"], Corner()(batch["train"]["image"]), rtol=0, atol=0.01)


def test_it_trains_reports_and_saves_no_logits(file: str, tmp_path: Path) -> None:
    config = recipes.load("stored") | {"steps": 6, "optim": {}}
    config |= {"student": {"class_path": "visiondistill.models.SmallConvNet", "init_args": {"widths": [4]}}}
    config["run"] |= {"output_dir": str(tmp_path / "run"), "batch_size": 8, "device": "cpu", "progress": False}
    config["run"] |= {"proof_window": 2, "log_every": 2, "evaluate_every": 3}
    outcome = workbench.run(recipes.override(config, {"teacher.file": file}), source=source(), artefacts=False)
    assert outcome.result.reason == "finished"
    assert outcome.facts.teacher_accuracy is None
    told = next(line for line in outcome.facts.lines() if line.startswith("teacher: stored logits"))
    assert told.endswith(f"weights {file}")
    assert outcome.metrics["teacher"] is None
    assert not [name for name in outcome.result.method.state_dict() if "teacher" in name]


def test_the_command_writes_what_a_run_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    config = recipes.load("ce") | {"data": {"class_path": "visiondistill.data.EmbeddedDigits"}, "steps": 60}
    config["student"] = {"class_path": "visiondistill.models.SmallConvNet", "init_args": {"widths": [8, 16]}}
    config["run"] |= {"output_dir": str(run), "batch_size": 32, "device": "cpu", "progress": False}
    config["optim"] = {"student": {"lr": 1e-2, "schedule": "cosine"}}
    outcome = workbench.run(config)
    path = str(tmp_path / "digits.safetensors")
    assert cli.main(["store", "--run", str(run), "--file", path]) == 0
    assert "logits of 1097 images" in capsys.readouterr().out
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["teacher"] == str(run)
    digits = recipes.source_of(config)
    student = Network(SmallConvNet((4,)), input_size=(1, 8, 8))
    built = Distiller(Stored(path), student=student, terms={"kd": KL()}, streams={"train": digits.stream(8)})
    batch = prepared(built, 0)
    with torch.no_grad():
        asked = LiveTeacher(outcome.student).targets(batch["train"])["logits"]
    torch.testing.assert_close(batch["teacher"]["logits"], asked, rtol=2e-3, atol=2e-2)
    assert cli.main(["store", "--run", str(run)]) == 2
    assert "--file FILE" in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    ("augmentor", "culprit"),
    [
        (Augment(shift=1), "Augment makes shift, and Stored has answers to no changed images but flip"),
        (Augment(zoom=0.5, erase=0.1), "erase, zoom"),
        (Augment(turn=5, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1), "brightness, contrast, .* turn,"),
        (Mix(CLASSES), "Mix makes mix"),
        (Chain([Augment(), Mix(CLASSES)]), "Chain makes mix"),
        (Hard(AffineRange()), "Stored has no network"),
        (Part(), "Part makes views of which it says nothing"),
        (Chain([Part()]), "says nothing"),
    ],
)
def test_images_that_the_teacher_has_not_seen(file: str, augmentor: Part, culprit: str) -> None:
    with pytest.raises(SettingsError, match=culprit):
        method(file, source(), augmentor)


def test_a_file_without_mirror_images_refuses_mirroring(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    store_targets(Corner(), source(), path, mirrored=False)
    with pytest.raises(SettingsError, match="Augment makes flip, and Stored has answers to no changed images but none"):
        method(str(path), source(), Augment())
    method(str(path), source(), Augment(flip=0))


def test_networks_are_asked_about_any_image() -> None:
    distiller({"kd": KL()}, augmentor=Augment(shift=1))
    distiller({"kd": KL()}, augmentor=Part())


def test_other_data(file: str) -> None:
    with pytest.raises(SettingsError, match="logits of 60 images, the training set has 57 before"):
        method(file, source(pictures(57)))
    with pytest.raises(SettingsError, match="other training images, or for these in another order"):
        method(file, source(pictures(seed=1)))
    cropped = Stream(source(val_fraction=0, test_fraction=0).train(), 8, transform=lambda image: image)
    with pytest.raises(SettingsError, match="cut them at random: set random_crop to null"):
        method(file, cropped)
    with pytest.raises(SettingsError, match=r"object is no data\.Stream"):
        Stored(file).settle(None, {"train": object()})


def test_a_shuffled_set_without_a_digest(file: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    with safe_open(file, "pt") as opened:
        save_file({"train_logits": opened.get_tensor("train_logits")}, bare)
    method(str(bare), source())
    data = pictures()
    shuffled = TensorData({name: column.roll(1, 0) for name, column in data.columns.items()})
    with pytest.raises(SettingsError, match=r"the label of 0\.0% of the training images, which is chance: their order"):
        method(str(bare), source(shuffled))
    with pytest.raises(SettingsError, match="which is chance"):
        method(str(bare), Stream(TensorData(data.columns | {"label": (data.columns["label"] + 1) % CLASSES}), 8))
    hidden = TensorData(data.columns | {"label": torch.full((COUNT,), -1)})
    method(str(bare), Stream(hidden, 8, labelled_fraction=1.0), terms={"kd": KL()})


def test_images_that_were_left_out_when_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    assert store_targets(Corner(), Pruned(source(val_fraction=0, test_fraction=0), 0.5), path) == COUNT // 2
    with pytest.raises(SettingsError, match="no logits for 30 of the 60 images"):
        method(str(path), source(val_fraction=0, test_fraction=0))


def test_other_files(file: str, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    with pytest.raises(SettingsError, match=r"no file of stored logits .*visiondistill store"):
        Stored(str(other))
    other.write_bytes(b"no tensors")
    with pytest.raises(SettingsError, match="not a readable safetensors file"):
        Stored(str(other))
    save_file({"logits": torch.zeros(2, 4, 3)}, other)
    with pytest.raises(SettingsError, match="no tensor 'train_logits'; there are logits"):
        Stored(str(other))
    for wrong in (torch.zeros(4, 3), torch.zeros(3, 4, 3), torch.zeros(2, 4, 3, dtype=torch.int64)):
        save_file({"train_logits": wrong}, other)
        with pytest.raises(SettingsError, match="must be floating"):
            Stored(str(other))
    with pytest.raises(SettingsError, match="the student tells 4 classes apart, the teacher 3"):
        Distiller(
            Stored(file),
            student=Network(SmallConvNet((4,), num_classes=4)),
            terms={"kd": KL()},
            streams={"train": source().stream(8)},
        )


def test_what_it_cannot_answer(file: str) -> None:
    with pytest.raises(SettingsError, match="no features, only logits"):
        method(file, source(), terms={"hint": Hint(0, 0)})
    with pytest.raises(SettingsError, match="to the training images alone"):
        Stored(file)(images().columns["image"])


def test_logits_too_large_for_the_file(tmp_path: Path) -> None:
    class Loud(Corner):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e6

    with pytest.raises(SettingsError, match="Loud gives logits that are not finite in fp16"):
        store_targets(Loud(), source(), tmp_path / "loud.safetensors")
    assert not (tmp_path / "loud.safetensors").exists()


def test_the_published_logits_belong_to_their_images(shared_dir: Path) -> None:
    root = shared_dir / "data" / "cifar100"
    path = shared_dir / "data" / "weights" / "efficientnet_lite" / "cifar100_logits_lite0_fp16.safetensors"
    if not root.is_dir() or not path.is_file():
        pytest.skip(f"no {root} or {path}")
    teacher = Stored(str(path))
    assert tuple(teacher.logits.shape) == (2, 30000, 100)
    pq = pytest.importorskip("pyarrow.parquet")
    columns = [pq.read_table(each, columns=["label"])["label"].to_pylist() for each in sorted(root.glob("train-*"))]
    label = torch.tensor(columns).flatten()
    for view in teacher.logits:
        assert (view.argmax(1) == label).double().mean().item() == pytest.approx(0.894, abs=0.005)
