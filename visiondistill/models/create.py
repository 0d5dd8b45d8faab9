"""Networks from a recipe: timm's by name, anyone's by class path, with weights from where the user says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from visiondistill.engine.state import sha256_of
from visiondistill.models import cifar
from visiondistill.models.loaded import LoadedNetwork, Trainable, with_new_head
from visiondistill.schema import import_object, nearest
from visiondistill.weights import WeightsSource, find_tensor, load_weights, read_weights

LOCAL, HUB = "local-dir:", "hf-hub:"
WEIGHTS = "model.safetensors"
RESERVED = {"num_classes", "pretrained", "checkpoint_path", "features_only"}


class Timm(LoadedNetwork):
    """A timm model with its own mean, std, size and interpolation; `cifar_<name>` are known too.

    The classifier is the one that came with the weights; only `new_head` replaces it.

    Args:
        name: of the model ("resnet18", "resnet18.a1_in1k"), "hf-hub:owner/model" or "local-dir:FOLDER".
        pretrained: load its published weights. None: yes for hf-hub: and local-dir:, which name weights,
            otherwise no.
        weights: a safetensors or PyTorch file, or a folder with one, in place of the published weights.
        weights_entry: which state dict of a file that holds several, such as "model_ema".
        num_classes: None: as many as the weights know, or the model's own number.
        new_head: put an untrained classifier of `num_classes` on the weights.
        trainable: "all", or "head": the classifier alone, the trunk frozen in eval mode.
        input_size: `(C, H, W)` in place of the model's own: images of another size are resized to it.
        mean, std: per channel, in place of the model's own.
        interpolation: of the resizing, in place of the model's own.
        options: further arguments of `timm.create_model`, such as `{"drop_path_rate": 0.1}`.

    Attributes:
        name: as given.
        source: of the weights, with the file's sha256.
        crop_pct: of the model's own evaluation.

    Raises:
        ValueError: unknown name, weights that cannot be had or do not fit, classes that they do not know.
        TypeError: options that the model does not take.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | None = None,
        weights: str | None = None,
        weights_entry: str | None = None,
        num_classes: int | None = None,
        new_head: bool = False,
        trainable: Trainable = "all",
        input_size: tuple[int, int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: Literal["bilinear", "bicubic"] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if pretrained is None:
            pretrained = weights is None and name.startswith((LOCAL, HUB))
        options = dict(options or {})
        _check_arguments(name, pretrained, weights, new_head, options)
        cifar.register()
        _check_name(name)
        input_size = input_size or _size_of(options)
        options |= _for_size(name, options, input_size)
        if pretrained:
            model, source = _pretrained(name, options)
        elif weights is not None:
            model, source = _from_file(name, options, weights, weights_entry, new_head)
        else:
            asked = {} if num_classes is None else {"num_classes": num_classes}
            model, source = _made(name, options | asked), WeightsSource()
        if new_head:
            with_new_head(model, num_classes)
        elif num_classes not in (None, model.num_classes):
            raise ValueError(_other_classes(name, model.num_classes, num_classes, weights))
        pixels = _data_config(model, input_size, options.get("in_chans"))
        own = {"mean": mean, "std": std, "interpolation": interpolation}
        pixels |= {key: value for key, value in own.items() if value is not None}
        super().__init__(model, source=source, trainable=trainable, **pixels)
        self.name = name

    @property
    def finetune_command(self) -> str:
        return _finetune(self.name, self.source.file if self.source.kind == "file" else None)


class ClassPath(LoadedNetwork):
    """Any classifier by the path of its class, or of a function that makes it.

    Args:
        class_path: such as "mypackage.nets.MyNet" or "torchvision.models.squeezenet1_1".
        init_args: what it is called with.
        weights: a safetensors or PyTorch file, or a folder with one.
        weights_entry: which state dict of a file that holds several.
        num_classes: passed on where the class takes an argument of that name and `init_args` has none.
        new_head: put an untrained classifier of `num_classes` on the weights, by `reset_classifier`.
        trainable: "all", or "head": what `get_classifier` gives, the rest frozen in eval mode.
        mean, std: per channel, in units of [0, 1] pixels; None leaves pixels as they are.
        input_size: `(C, H, W)` that the model expects; None takes every size as it comes.
        interpolation: of the resizing.

    Attributes:
        name: the class path.
        source: of the weights, with the file's sha256.

    Raises:
        ValueError: nothing at that path, or weights that cannot be read or do not fit.
        TypeError: it does not take these arguments, gives no module, or lacks a method that is asked for.
    """

    def __init__(
        self,
        class_path: str,
        init_args: dict[str, Any] | None = None,
        weights: str | None = None,
        weights_entry: str | None = None,
        num_classes: int | None = None,
        new_head: bool = False,
        trainable: Trainable = "all",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: tuple[int, int, int] | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        maker, arguments = import_object(class_path, "class_path"), dict(init_args or {})
        if num_classes is not None and not new_head and _takes(maker, "num_classes"):
            arguments.setdefault("num_classes", num_classes)
        try:
            model = maker(**arguments)
        except TypeError as error:
            raise TypeError(f"class_path {class_path!r} with {sorted(arguments)}: {error}") from error
        if not isinstance(model, nn.Module):
            raise TypeError(f"class_path {class_path!r} gives a {type(model).__name__}, not a torch.nn.Module")
        source = WeightsSource() if weights is None else load_weights(model, *read_weights(weights, weights_entry))
        if new_head:
            with_new_head(model, num_classes)
        super().__init__(model, mean, std, input_size, interpolation, source, trainable, crop_pct=1.0)
        self.name = class_path
        self._num_classes = num_classes if new_head else arguments.get("num_classes", num_classes)

    @property
    def num_classes(self) -> int | None:
        """What the model says, else what it was asked for."""
        known = super().num_classes
        return self._num_classes if known is None else known


def _check_arguments(name: str, pretrained: bool, weights: str | None, new_head: bool, options: dict[str, Any]) -> None:
    if pretrained and weights is not None:
        raise ValueError(f"{name}: pretrained and weights exclude each other, got weights {weights}")
    if new_head and not pretrained and weights is None:
        raise ValueError(f"{name}: new_head needs pretrained or weights; without them every layer is new")
    if taken := sorted(RESERVED & set(options)):
        raise ValueError(f"{name}: options must not hold {taken}; what they do, the arguments of Timm do")


def _check_name(name: str) -> None:
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    if name.startswith((LOCAL, HUB)):
        if name.startswith(LOCAL) and not (Path(name.removeprefix(LOCAL)) / "config.json").is_file():
            raise ValueError(f"{name}: no config.json in this folder; a model that timm exported has one")
        if name.startswith(HUB):
            _require_hub(name, name.removeprefix(HUB), "config.json")
        return
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        cure = "" if "/" not in name else f"; a model of the hub is {HUB}{name}, a folder {LOCAL}{name}"
        raise ValueError(f"timm has no model {architecture!r}{nearest(architecture, timm.list_models(), 3)}{cure}")
    tags = [known for known in get_arch_pretrained_cfgs(architecture) if known != architecture]
    if tag and name not in tags:
        raise ValueError(f"{architecture} has no weights {tag!r}; there are {', '.join(tags) or 'none'}")


def _size_of(options: dict[str, Any]) -> tuple[int, int, int] | None:
    """The input size that a model made for one size is asked for."""
    size = options.get("img_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return options.get("in_chans", 3), height, width


def _for_size(name: str, options: dict[str, Any], size: tuple[int, int, int] | None) -> dict[str, Any]:
    """Further options, so that the model takes images of this size."""
    if size is None:
        return {}
    from timm.models import get_pretrained_cfg

    known = None if name.startswith((LOCAL, HUB)) else get_pretrained_cfg(name)
    fixed = known is not None and known.fixed_input_size and not options.get("dynamic_img_size", False)
    further = {"img_size": tuple(size[1:])} if fixed and "img_size" not in options else {}
    return further | ({"in_chans": size[0]} if size[0] != 3 else {})


def _made(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        raise TypeError(f"{name} with options {sorted(options)}: {error}") from error
    except OSError as error:
        raise _unavailable(name, "its configuration", error) from error


def _pretrained(name: str, options: dict[str, Any]) -> tuple[nn.Module, WeightsSource]:
    import timm

    if name.startswith(LOCAL):
        # timm takes the first of several files, and the average of several state dicts, without a word.
        _, source = read_weights(name.removeprefix(LOCAL))
        return timm.create_model(name, pretrained=True, **options), source
    bare = _made(name, options)
    if not _places(bare.pretrained_cfg):
        raise ValueError(f"{name} has no published weights: choose pretrained: false, or give weights: FILE")
    if bare.pretrained_cfg.get("hf_hub_id") and _cached(bare.pretrained_cfg) is None:
        _require_hub(name, bare.pretrained_cfg["hf_hub_id"], bare.pretrained_cfg.get("hf_hub_filename") or WEIGHTS)
    try:
        model = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # whatever the client of the hub raises: there are many kinds
        raise _unavailable(name, " or ".join(_places(bare.pretrained_cfg)), error) from error
    file = _cached(model.pretrained_cfg)
    told = _places(model.pretrained_cfg)[0]
    if file is None:
        return model, WeightsSource("pretrained", told)
    return model, WeightsSource("pretrained", str(file), sha256_of(file), (told,))


def _from_file(
    name: str, options: dict[str, Any], weights: str, entry: str | None, new_head: bool
) -> tuple[nn.Module, WeightsSource]:
    tensors, source = read_weights(weights, entry)
    model = _made(name, options)
    classifier = model.pretrained_cfg.get("classifier") or ""
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    stored = find_tensor(tensors, f"{classifier}.weight")
    if stored is not None and stored.shape[0] != model.num_classes:
        model.reset_classifier(stored.shape[0])
    elif stored is None and new_head:
        model.reset_classifier(0)
    return model, load_weights(model, tensors, source)


def _data_config(model: nn.Module, input_size: tuple[int, int, int] | None, channels: int | None) -> dict[str, Any]:
    """What the model's own evaluation does to images: mean, std, input_size, interpolation, crop_pct."""
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=model)
    size = tuple(config["input_size"] if input_size is None else input_size)
    channels = channels or size[0]

    def fitted(values: Sequence[float]) -> list[float]:
        # timm adapts the first convolution to other channel counts; grey images take the mean of the statistics.
        return list(values) if len(values) == channels else [sum(values) / len(values)] * channels

    return {
        "mean": fitted(config["mean"]),
        "std": fitted(config["std"]),
        "input_size": (channels, *size[1:]),
        "interpolation": "bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        "crop_pct": config["crop_pct"],
    }


def _places(config: dict[str, Any]) -> list[str]:
    """Where timm looks for published weights, in its order."""
    file = config.get("hf_hub_filename") or WEIGHTS
    hub = [f"{HUB}{config['hf_hub_id']}/{file}"] if config.get("hf_hub_id") else []
    return hub + ([config["url"]] if config.get("url") else [])


def _cached(config: dict[str, Any]) -> Path | None:
    """The file that timm has just read, where its caches tell."""
    import torch
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = (config.get("hf_hub_id") or "").partition("@")
    for file in filter(None, (config.get("hf_hub_filename"), WEIGHTS, "pytorch_model.bin")):
        found = try_to_load_from_cache(repository, file, revision=revision or None) if repository else None
        if isinstance(found, str):
            return Path(found)
    url = config.get("url") or ""
    downloaded = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return downloaded if url and downloaded.is_file() else None


def _require_hub(name: str, model_id: str, file: str) -> None:
    """Fail at once where a file is not in the cache and the hub does not answer; its own client retries for minutes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = model_id.partition("@")
    if isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision or None))
    except HfHubHTTPError:
        return  # it answered; what it holds is timm's to find out
    except Exception as error:  # of whichever HTTP library its client uses
        raise _unavailable(name, f"{HUB}{model_id}/{file}", error) from error


def _takes(maker: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(maker).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _other_classes(name: str, known: int, asked: int, weights: str | None) -> str:
    return (
        f"the weights of {name} tell {known} classes apart, {asked} were asked for. For a student, new_head: true puts "
        f"an untrained classifier on them; this makes a teacher of {asked} classes:\n  {_finetune(name, weights)}"
    )


def _finetune(name: str, weights: str | None) -> str:
    given = f" --student.pretrained false --student.weights {weights}" if weights else ""
    return f"visiondistill train --recipe finetune --student.name {name}{given} --data.root DIR"


def _unavailable(name: str, what: str, error: Exception) -> ValueError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ValueError(
        f"{name}: {what} cannot be had ({reason}). Without a network, fetch the file on another machine and give it "
        f"as weights: FILE (with name: {name.removeprefix(HUB).rpartition('/')[2]}), or start from random weights: "
        f"pretrained: false"
    )
