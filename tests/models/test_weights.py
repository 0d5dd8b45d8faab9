"""A weight file is loaded whole or not at all, runs no code, and what was done is said."""

from __future__ import annotations

import hashlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from visiondistill.models import load_weights, read_weights


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.fixture
def donor() -> nn.Sequential:
    torch.manual_seed(1)
    model = small()
    model[1].running_mean.normal_()
    return model


def loaded(path, **options) -> tuple[nn.Sequential, tuple[str, ...]]:
    model = small()
    return model, load_weights(model, *read_weights(path, **options)).notes


def same(model: nn.Module, other: nn.Module) -> bool:
    own, theirs = model.state_dict(), other.state_dict()
    return set(own) == set(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_state_dict_comes_through_bit_for_bit(tmp_path, donor, suffix):
    path = tmp_path / f"w.{suffix}"
    save_file(donor.state_dict(), path) if suffix == "safetensors" else torch.save(donor.state_dict(), path)
    model, notes = loaded(path)
    assert same(model, donor)
    assert notes == ()
    source = read_weights(path)[1]
    assert (source.kind, source.file) == ("file", str(path))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("entry", ["state_dict", "model", "model_ema"])
def test_wrappers_are_stripped_and_said(tmp_path, donor, prefix, entry):
    content = {entry: {prefix + name: tensor for name, tensor in donor.state_dict().items()}}
    torch.save(content | {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, tmp_path / "w.th")
    model, notes = loaded(tmp_path / "w.th")
    assert same(model, donor)
    assert notes == (f"took the entry '{entry}'", f"stripped the prefix '{prefix}'")


def test_a_prefix_that_is_the_models_own_stays(tmp_path, donor):
    model = nn.ModuleDict({"model": small()})
    torch.save({f"model.{name}": tensor for name, tensor in donor.state_dict().items()}, tmp_path / "w.pt")
    assert load_weights(model, *read_weights(tmp_path / "w.pt")).notes == ()
    assert same(model["model"], donor)


def test_several_state_dicts_in_one_file_are_refused_by_name(tmp_path, donor):
    averaged = {name: tensor + 1 for name, tensor in donor.state_dict().items()}
    torch.save({"state_dict": donor.state_dict(), "state_dict_ema": averaged, "epoch": 1}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match="several state dicts, state_dict, state_dict_ema: choose one by weights_entry"
    ):
        read_weights(tmp_path / "w.pth")
    model, notes = loaded(tmp_path / "w.pth", entry="state_dict_ema")
    assert torch.equal(model[0].weight, donor[0].weight + 1)
    assert notes == ("took the entry 'state_dict_ema'",)
    with pytest.raises(ValueError, match="no state dict 'ema'; there are state_dict, state_dict_ema"):
        read_weights(tmp_path / "w.pth", entry="ema")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted_exactly_and_said(tmp_path, donor, dtype):
    halves = {n: t.to(dtype) if t.is_floating_point() else t for n, t in donor.state_dict().items()}
    save_file(halves, tmp_path / "w.safetensors")
    model, notes = loaded(tmp_path / "w.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, halves["0.weight"].float())
    assert notes == (f"lifted {str(dtype).removeprefix('torch.')} to float32",)


def test_counters_that_old_files_lack_are_kept_and_said(tmp_path, donor):
    tensors = {name: tensor for name, tensor in donor.state_dict().items() if "num_batches" not in name}
    torch.save(tensors, tmp_path / "w.pth")
    model, notes = loaded(tmp_path / "w.pth")
    assert torch.equal(model[1].running_mean, donor[1].running_mean)
    assert notes == ("kept 1 counters num_batches_tracked that the file lacks",)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("1.running_var"), "1 missing in the file: '1.running_var'"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unknown to the model: 'extra'"),
        (lambda t: t.update({"3.weight": torch.zeros(5, 4)}), r"1 of another shape: '3.weight \[5, 4\] for \[2, 4\]'"),
        (
            lambda t: t.update({"3.bias": torch.zeros(2, dtype=torch.int8)}),
            "1 of another kind: '3.bias int8 for float32'",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_loaded(tmp_path, donor, change, told):
    tensors = dict(donor.state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "w.pth")
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=told) as refused:
        load_weights(model, *read_weights(tmp_path / "w.pth"))
    assert str(tmp_path / "w.pth") in str(refused.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folder_with_one_file_is_that_file_and_with_more_is_refused(tmp_path, donor):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight file in this folder"):
        read_weights(tmp_path)
    save_file(donor.state_dict(), tmp_path / "best.safetensors")
    assert same(loaded(tmp_path)[0], donor)
    torch.save(donor.state_dict(), tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"several weight files, name one of best.safetensors, last.pth"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_weights(tmp_path / "nothing.pth")


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_could_run_code_is_refused_before_it_does(tmp_path, donor, zipped):
    made = tmp_path / "made"
    content = {"state_dict": donor.state_dict(), "args": Harmful(str(made))}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="could run code when it is opened; it was not"):
        read_weights(tmp_path / "w.pth")
    assert not made.exists()


def test_a_whole_pickled_model_is_refused(tmp_path, donor):
    torch.save(donor, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="save its state dict as safetensors"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_damaged_file_is_refused_by_name(tmp_path, donor, suffix):
    path = tmp_path / f"w.{suffix}"
    save_file(donor.state_dict(), path) if suffix == "safetensors" else torch.save(donor.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for content in (path.read_bytes(), b"", b"root:x:0:0:root:/root:/bin/sh\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"w.{suffix}: not a readable"):
            read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1, "loss": 0.5}, {}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt: (holds a list|no state dict among its entries)"):
        read_weights(tmp_path / "w.pt")


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Harmful(str(tmp_path / "made"))}, protocol=2))
    with pytest.raises(ValueError, match=r"w\.pt"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "made").exists()
