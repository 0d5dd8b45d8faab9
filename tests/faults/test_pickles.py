"""A file that would run code when it is opened is refused before it does, wherever the command line reads files."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import visiondistill
from visiondistill import recipe_files
from visiondistill.cli import main
from visiondistill.data import EmbeddedDigits
from visiondistill.engine import state
from visiondistill.engine.state import sha256_of
from visiondistill.export import export, open_export, program


class Harmful:
    """Unpickling it makes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def tarred(content: object, path: Path) -> None:
    """The form that torch 0.1 wrote; its loader looks for a pickle in a tar archive."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


FORMS: dict[str, Callable[[object, Path], None]] = {
    "zipped": zipped,
    "legacy": legacy,
    "plain": plain,
    "tarred": tarred,
}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """The folder that only a pickle that was opened can have made."""
    folder = tmp_path / "made"
    yield folder
    assert not folder.exists(), "the pickle was opened"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for index in range(4):
            Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


def test_the_forms_are_harmful(tmp_path: Path) -> None:
    """What is refused below makes its folder where it is opened without care."""
    for name, save in FORMS.items():
        folder = tmp_path / f"made by {name}"
        save({"state_dict": {"weight": torch.ones(1)}, "args": Harmful(folder)}, tmp_path / "w.pt")
        try:
            torch.load(tmp_path / "w.pt", weights_only=False) if name != "plain" else pickle.loads(
                (tmp_path / "w.pt").read_bytes()
            )
        except Exception:
            assert name == "tarred"
        assert folder.is_dir(), name


CASES = [(role, suffix, form) for role in ("student", "teacher") for suffix in ("pt", "safetensors") for form in FORMS]
CASES += [("student", suffix, "zipped") for suffix in ("pth", "bin", "ckpt")]


@pytest.mark.parametrize(("role", "suffix", "form"), CASES)
def test_weights(
    role: str, suffix: str, form: str, photos: Path, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture
) -> None:
    file, run = tmp_path / f"w.{suffix}", tmp_path / "run"
    FORMS[form]({"state_dict": nn.Linear(2, 2).state_dict(), "args": Harmful(made)}, file)
    others = {"student": "teacher", "teacher": "student"}
    words = ["train", "--recipe", "kd", "--data.root", str(photos), "--run.output_dir", str(run), "--run.device", "cpu"]
    words += [f"--{role}.name", "cifar_resnet20", f"--{role}.weights", str(file), f"--{role}.pretrained", "false"]
    words += [f"--{others[role]}.name", "cifar_resnet20", f"--{others[role]}.pretrained", "false"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert role in said
    assert str(file) in said
    assert "could run code when it is opened; it was not" in said or "not a readable" in said
    assert not run.exists()


def spoil(folder: Path, made: Path, name: str = "weights.safetensors") -> None:
    """Put a pickle into a checkpoint, its manifest made to fit."""
    zipped({"x": Harmful(made)}, folder / name)
    sums = json.loads((folder / state.MANIFEST).read_text())
    sums[name] = sha256_of(folder / name)
    (folder / state.MANIFEST).write_text(json.dumps(sums))


@pytest.mark.parametrize("key", ["resume", "init_from"])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_checkpoints(key: str, name: str, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["train", "--recipe", "smoke/kd", "--run.progress", "false", "--stages.teacher.steps", "2"]
    words += ["--stages.student.steps", "2", "--run.proof_window", "1"]
    assert main([*words, "--run.output_dir", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "checkpoints" / "stage_0_teacher"
    spoil(folder, made, name)
    other = ["--run.output_dir", str(tmp_path / "other"), f"--run.{key}", str(folder)]
    code, said = main([*words, *other]), capsys.readouterr().err
    if name == "weights.safetensors":
        assert code == 2
        assert f"{folder / name} is not a safetensors file" in said
    else:
        assert code == 0, "a file that no checkpoint has is not opened"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one's own, as a program."""
    folder = tmp_path_factory.mktemp("program") / "export"
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    export(network, folder, classes=EmbeddedDigits().classes, input_size=(1, 8, 8))
    return folder


def rewritten(folder: Path, change: dict[str, bytes], more: dict[str, bytes]) -> None:
    """Exchange and add records of the program; the sums in export.json fit."""
    file = folder / program.FILE
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records:
            archive.writestr(name, change.get(name.removeprefix(f"{root}/"), content))
        for name, content in more.items():
            archive.writestr(f"{root}/{name}", content)
    facts = json.loads((folder / "export.json").read_text())
    facts["files"][program.FILE] = sha256_of(file)
    (folder / "export.json").write_text(json.dumps(facts))


PICKLED = json.dumps(
    {"config": {"weight": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}}
).encode()
SAMPLES, CONFIG = "data/sample_inputs/model.pt", "data/weights/model_weights_config.json"

PROGRAMS: dict[str, Callable[[bytes], tuple[dict[str, bytes], dict[str, bytes]]]] = {
    "sample inputs": lambda harm: ({SAMPLES: harm}, {}),
    "sample inputs twice": lambda harm: ({}, {SAMPLES: harm}),
    "a pickled weight": lambda harm: ({CONFIG: PICKLED, "data/weights/weight_0": harm}, {}),
    "weights as before": lambda harm: ({}, {"data/weights/model.pt": harm}),
    "an object": lambda harm: ({}, {"data/constants/opaque_obj_0": harm}),
    "a library": lambda harm: ({}, {"data/aotinductor/model/model.so": harm}),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", PROGRAMS)
def test_exported_programs(
    kind: str, exported: Path, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    open_export(folder)
    zipped({"x": Harmful(made)}, tmp_path / "harm")
    rewritten(folder, *PROGRAMS[kind]((tmp_path / "harm").read_bytes()))
    assert main(["evaluate", "accuracy", "--model", str(folder), "--data.root", "nowhere"]) == 2
    assert "could run code when it is opened; it was not" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_folders_of_timm(suffix: str, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture) -> None:
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("test_vit", num_classes=10), str(tmp_path), safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    zipped({"x": Harmful(made)}, tmp_path / ("pytorch_model.bin" if suffix == "bin" else "model.safetensors"))
    assert main(["evaluate", "cost", "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_recipes_run_nothing(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"run: !!python/object/apply:os.mkdir [{made}]\n")
    assert main(["train", "--recipe", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
    assert main(["train", "--recipe", "kd", "--steps", f"!!python/object/apply:os.mkdir [{made}]"]) == 2
    assert "--steps" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ IN THE SOURCES

SAFE_LOADERS = {"_Loader"}
"""Loaders of YAML that derive from SafeLoader; see the test below."""


def unsafe(source: str) -> list[str]:
    """Calls that could run what a file says, as "line: call"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call, options = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        arguments = [ast.unparse(each) for each in node.args]
        reasons = [
            call in ("eval", "exec", "compile", "os.system", "__import__"),
            call.rpartition(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal")
            and call.rpartition(".")[2] in ("load", "loads", "Unpickler"),
            call in ("torch.load", "load_state_dict_from_url") and options.get("weights_only") != "True",
            call in ("torch.jit.load", "torch.package.PackageImporter", "yaml.unsafe_load", "yaml.full_load"),
            call == "torch.export.load",
            call == "yaml.load" and not {*arguments[1:], options.get("Loader")} & SAFE_LOADERS,
            "trust_remote_code" in options and options["trust_remote_code"] != "False",
            options.get("allow_pickle", "False") != "False",
            options.get("shell", "False") != "False",
            options.get("weights_only", "True") != "True",
        ]
        if any(reasons):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


ALLOWED = {("visiondistill/export/program.py", "torch.export.load(file)")}
"""After `_is_plain` has looked into the file."""


def sources() -> Iterator[Path]:
    root = Path(visiondistill.__file__).parents[1]
    for folder in ("visiondistill", "diffusion", "scripts"):
        yield from (root / folder).rglob("*.py")


def test_no_source_opens_what_could_run() -> None:
    root = Path(visiondistill.__file__).parents[1]
    calls = {str(path.relative_to(root)): unsafe(path.read_text()) for path in sources()}
    assert len(calls) > 100
    assert {(path, call.partition(": ")[2]) for path, found in calls.items() for call in found} == ALLOWED
    assert all(issubclass(getattr(recipe_files, name), yaml.SafeLoader) for name in SAFE_LOADERS)


@pytest.mark.parametrize(
    "line",
    [
        *("eval(text)", "exec(text)", "pickle.load(file)", "pickle.loads(data)", "torch.load(file)"),
        *("torch.load(file, weights_only=False)", "yaml.load(file, yaml.Loader)", "yaml.load(file)"),
        *("np.load(file, allow_pickle=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        *("torch.export.load(path)", "torch.jit.load(path)", "subprocess.run(text, shell=True)", "os.system(text)"),
        *("torch.load(file, weights_only=careful)", "pickle.Unpickler(file)"),
    ],
)
def test_the_look_at_sources_finds(line: str) -> None:
    assert unsafe(line)


@pytest.mark.parametrize(
    "line",
    [
        *("model.eval()", "torch.load(file, weights_only=True)", "yaml.load(file, _Loader)", "safetensors.load(data)"),
        *("np.load(file, allow_pickle=False)", "json.load(file)", "re.compile(text)", "module.compile()"),
    ],
)
def test_the_look_at_sources_lets_pass(line: str) -> None:
    assert not unsafe(line)
