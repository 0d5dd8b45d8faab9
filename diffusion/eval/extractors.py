"""Networks whose features distances between sets of images are taken of.

The name "fid" belongs to the published Inception network alone; with any other extractor the
distance is `fd_<extractor>`, and the figures of two extractors say nothing about each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, leaky_relu

from visiondistill import measure, schema
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.state import sha256_of
from visiondistill.eval import preprocessing, weights_hash

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION = "inception"

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
TIMM = "timm:"


def quantised(images: Tensor) -> Tensor:
    """Images as a file holds them, uint8: rounded to the nearest of 256 values; uint8 stays."""
    return images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)


class Extractor(nn.Module):
    """Images to rows of features, always in eval mode and without gradients.

    Args:
        name: in a word, as it stands behind `fd_`.
        identity: sha256 of the weights.
        preprocessing: what happens to the pixels, and which layer is read: plain data for reports
            and for the key of a cache.
        channels: that it takes: grey images are repeated to three. None takes images as they come.
    """

    def __init__(self, name: str, identity: str, preprocessing: dict[str, Any], channels: int | None = 3) -> None:
        super().__init__()
        self.name, self.identity, self.preprocessing, self.channels = name, identity, preprocessing, channels
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What its features depend on, as plain data."""
        return {"extractor": self.name, "sha256": self.identity, "preprocessing": self.preprocessing}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float32 `[B, D]` on the extractor's device.

        Args:
            images: `[B, C, H, W]`, uint8 or floating in [0, 1]; the latter are rounded to 8 bits.

        Raises:
            SettingsError: another number of channels.
        """
        pixels = quantised(images).to(self.anchor.device, non_blocking=True)
        if self.channels == 3 and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        if self.channels not in (None, pixels.shape[1]):
            raise SettingsError(
                f"{self.name} takes images of {self.channels} channels, got {pixels.shape[1]}: take another extractor"
            )
        return self.eval()(pixels).float().flatten(1)

    def train(self, mode: bool = True) -> Extractor:
        """Stays in eval mode."""
        return super().train(False)


class NetworkExtractor(Extractor):
    """Features of a classifier, read before its last layer.

    Args:
        name: as of `Extractor`.
        network: a `visiondistill.models.Network`: it resizes the whole image (antialiased) and normalises it.
        read: `(network, pixels in [0, 1]) -> [B, D]`.
        layer: what that is, in words.
    """

    def __init__(self, name: str, network: nn.Module, read: Callable[[nn.Module, Tensor], Tensor], layer: str) -> None:
        told = preprocessing(network) | {"layer": layer}
        channels = None if network.input_size is None else network.input_size[0]
        super().__init__(name, weights_hash(network), told, channels)
        self.network, self.read = network.requires_grad_(False), read

    def forward(self, pixels: Tensor) -> Tensor:
        return self.read(self.network, pixels.float() / 255)


class RandomExtractor(Extractor):
    """Spatial means of every layer of a small convolutional network with random weights: needs no file.

    It sees colours, edges and textures, no objects: enough to tell a broken generator from a sound
    one, not to rank two good ones.

    Args:
        seed: of the weights.
        size: that images are resized to.
        widths: of the layers; the features are as many as their sum.
    """

    def __init__(self, seed: int = 0, size: int = 32, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        generator, self.size = torch.Generator().manual_seed(seed), size
        weights = []
        for inward, outward in zip((3, *widths), widths, strict=False):
            scale = (2 / (9 * inward)) ** 0.5
            weights.append(nn.Parameter(torch.randn(outward, inward, 3, 3, generator=generator) * scale, False))
        told = {"input_size": [3, size, size], "pixels": "[-1, 1]", "interpolation": "bilinear", "antialias": True}
        digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()
        super().__init__("random", digest, told | {"layer": "means of every layer", "seed": seed})
        self.weights = nn.ParameterList(weights)

    def forward(self, pixels: Tensor) -> Tensor:
        x = interpolate(pixels.float() / 127.5 - 1, (self.size, self.size), mode="bilinear", antialias=True)
        means = []
        for weight in self.weights:
            x = leaky_relu(nn.functional.conv2d(x, weight, stride=2, padding=1), 0.2)
            means.append(adaptive_avg_pool2d(x, 1).flatten(1))
        return torch.cat(means, 1)


class InceptionExtractor(Extractor):
    """The published Inception network of FID by torch-fidelity: its 2048 features and its own resizing.

    Args:
        weights: the file "weights-inception-2015-12-05-6726825d.pth" of torch-fidelity's releases.

    Raises:
        SettingsError: no such file, another one (its figures would not be FID), or torch-fidelity is not installed.
    """

    def __init__(self, weights: str | Path) -> None:
        _require_inception(Path(weights))
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise SettingsError(f"fid needs torch-fidelity: pip install 'visiondistill[eval]' ({error})") from error
        told = {"input_size": [3, 299, 299], "pixels": "8 bits", "interpolation": "bilinear as in TensorFlow 1"}
        super().__init__(INCEPTION, INCEPTION_SHA256, told | {"antialias": False, "layer": "2048"})
        self.network = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(weights))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[0]


def squeezenet(weights: str | Path | None = None, size: int = 96) -> Extractor:
    """SqueezeNet 1.1 of ImageNet: its last feature map, averaged over positions, 512 features.

    Args:
        weights: a state dict of `torchvision.models.squeezenet1_1`; None takes torchvision's own, from
            its cache or its server.
        size: that images are resized to.

    Raises:
        SettingsError: weights that do not fit or cannot be had.
    """
    source = {"init_args": {"weights": "DEFAULT"}} if weights is None else {"weights": str(weights)}
    arguments = {"class_path": "torchvision.models.squeezenet1_1", "input_size": [3, size, size], **IMAGENET, **source}
    try:
        network = _built("visiondistill.models.ClassPath", arguments)
    except OSError as error:
        raise SettingsError(
            f"squeezenet's published weights are neither in torchvision's cache nor to be had ({error}): name a file "
            f"of them (--extractor_weights FILE), or take random features, which need none (--extractor random)"
        ) from error
    return NetworkExtractor("squeezenet", network, _last_map, "mean of the last feature map")


def timm_features(name: str, weights: str | Path | None = None) -> Extractor:
    """A timm model's pooled features, of images resized whole to its own size.

    Args:
        name: of the model.
        weights: a file of them; None takes the published ones.

    Raises:
        SettingsError: unknown name, or weights that do not fit or cannot be had.
    """
    source = {"pretrained": True} if weights is None else {"weights": str(weights)}
    network = _built("visiondistill.models.Timm", {"name": name, **source})
    return NetworkExtractor(name, network, _embedding, "pooled features")


def classifier_features(folder: str | Path) -> Extractor:
    """Features of a classifier that was trained by the suite: its pooled features, or its logits where it is a program.

    Args:
        folder: of an export, or of a run that has one.

    Raises:
        SettingsError: no export is there, or it is damaged.
    """
    network, _ = open_classifier(folder)
    name = f"classifier-{weights_hash(network)[:8]}"
    if hasattr(network.model, "forward_head"):
        return NetworkExtractor(name, network, _embedding, "pooled features")
    return NetworkExtractor(name, network, _logits, "logits")


def open_classifier(folder: str | Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The `Network` in an export's folder, or in that of a run, in eval mode, and the names of its classes.

    Raises:
        SettingsError: no export is there, or it is damaged.
    """
    folder = Path(folder)
    network, facts = measure.network_of(str(folder / "export" if (folder / "export").is_dir() else folder))
    return network, tuple(facts.get("classes", ()))


def extractor_of(name: str, weights: str | Path | None = None) -> Extractor:
    """An extractor by its name on the command line.

    Args:
        name: "squeezenet", "random", "inception", "timm:NAME", or a folder with a classifier.
        weights: file of the first, third and fourth.

    Raises:
        SettingsError: none of these, weights that are missing or not taken, or as of each.
    """
    known = {"squeezenet": squeezenet, INCEPTION: _inception}
    if name in known:
        return known[name](weights)
    if name.startswith(TIMM):
        return timm_features(name.removeprefix(TIMM), weights)
    if weights is not None:
        raise SettingsError(f"extractor {name!r} takes no weights: it is seeded, or a folder that holds them")
    if name == "random":
        return RandomExtractor()
    if Path(name).is_dir():
        return classifier_features(name)
    raise SettingsError(
        f"no extractor {name!r}: choose squeezenet, random, {INCEPTION}, {TIMM}NAME or a classifier's folder"
    )


def _inception(weights: str | Path | None) -> Extractor:
    if weights is None:
        raise SettingsError(
            f"fid needs the file {INCEPTION_FILE} of torch-fidelity's releases: name it as the weights "
            f"(--extractor_weights FILE)"
        )
    return InceptionExtractor(weights)


def _require_inception(file: Path) -> None:
    cure = (
        f"name {INCEPTION_FILE} of torch-fidelity's releases (--extractor_weights FILE), or measure fd with another "
        f"extractor"
    )
    if not file.is_file():
        raise SettingsError(f"fid: there is no file {file}; {cure}")
    found = sha256_of(file)
    # Before it is opened: torch-fidelity reads it as a pickle that may run code.
    if found != INCEPTION_SHA256:
        raise SettingsError(
            f"fid: {file} has the sha256 {found[:8]}..., the published Inception weights {INCEPTION_SHA256[:8]}...: "
            f"with others the figure would not be FID; {cure}"
        )


def _built(class_path: str, arguments: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # models draw weights before theirs are read
        return schema.build({"class_path": class_path, "init_args": arguments}, nn.Module, "extractor")


def _embedding(network: nn.Module, pixels: Tensor) -> Tensor:
    return network(pixels, embedding=True).embedding


def _logits(network: nn.Module, pixels: Tensor) -> Tensor:
    return network(pixels).logits


def _last_map(network: nn.Module, pixels: Tensor) -> Tensor:
    return network.model.features(network.prepare(pixels)).mean((2, 3))
