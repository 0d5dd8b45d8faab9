"""Prompts from a text file, encoded once by a pipeline's own text encoders, and kept in a folder where one likes.

Such a folder holds `embeddings.safetensors` and `prompts.json`, which says of which prompts and by which encoders.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffusion.conditions import Prompts, TextEncoders, texts_digest
from diffusion.models.schedulers import read_json
from visiondistill.engine.state import sha256_of

Named = dict[str, Tensor]

MANIFEST, EMBEDDINGS = "prompts.json", "embeddings.safetensors"
CURE = "delete it, or name another"

SETTINGS = {
    "unet": ("sample_size",),
    "transformer": ("sample_size", "joint_attention_dim"),
    "vae": ("block_out_channels",),
}
"""Fields of other parts' configs that embeddings depend on: sizes of images and of text encoders that are left out."""


def read_prompts(file: str | Path) -> list[str]:
    """One prompt a line, blank lines skipped.

    Raises:
        ValueError: no such file, not UTF-8, or no prompt in it.
    """
    prompts = [line for line in _lines("prompts", Path(file)) if line]
    if not prompts:
        raise ValueError(f"prompts {file}: no prompt in it; write one a line")
    return prompts


def read_captions(file: str | Path) -> list[str]:
    """The captions of images, one a line in the order of the images.

    Raises:
        ValueError: no such file, not UTF-8, or a line without a caption.
    """
    captions = _lines("captions", Path(file))
    if "" in captions:
        raise ValueError(f"captions {file}: line {captions.index('') + 1} is empty: each image needs its caption there")
    return captions


def encode_prompts(
    open_pipeline: Callable[[], Any],
    encoders: TextEncoders,
    file: str | Path,
    cache: str | Path | None = None,
    batch_size: int = 32,
) -> Prompts:
    """The prompts of a file as a pipeline's networks take them.

    Args:
        open_pipeline: gives the pipeline of diffusers with its tokenizers and text encoders; not called
            where the cache has all.
        encoders: where these lie.
        file: of prompts, see `read_prompts`.
        cache: a folder that keeps the embeddings: written if it is missing, else read.
        batch_size: prompts that are encoded at a time.

    Raises:
        ValueError: of `read_prompts`, a batch_size < 1, or a cache that is damaged, something else, or of other
            encoders or prompts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not allowed: at least 1")
    texts = read_prompts(file)
    if cache is None:
        held = _encoded(open_pipeline(), texts, batch_size)
    else:
        cache, made_of = Path(cache), {"encoders": encoders_hash(encoders), "prompts": texts_digest(texts)}
        if _is_free(cache):
            held = _encoded(open_pipeline(), texts, batch_size)
            _write(cache, held, made_of)
        else:
            held = _read(cache, made_of, {"encoders": encoders.folder, "prompts": str(file)})
    null = {name.removeprefix("null/"): tensor for name, tensor in held.items() if name.startswith("null/")}
    own = {name: tensor for name, tensor in held.items() if name in null}
    return Prompts(texts, _nested(own), _nested(null), encoders)


def encoders_hash(encoders: TextEncoders) -> str:
    """sha256 over the names and bytes of all files of the encoders and tokenizers, and over `SETTINGS`."""
    folder = Path(encoders.folder)
    digest = hashlib.sha256(f"{encoders.pipeline}{_settings(folder)}".encode())
    for name in encoders.names:
        for file in sorted((folder / name).iterdir()):
            digest.update(f"{name}/{file.name}{sha256_of(file)}".encode())
    return digest.hexdigest()


def _settings(folder: Path) -> dict[str, Any]:
    found = {"null": read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt")}
    for part, fields in SETTINGS.items():
        file = folder / part / "config.json"
        config = read_json(file) if file.is_file() else {}
        found |= {f"{part}.{field}": config.get(field) for field in fields}
    return found


def _lines(what: str, file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text("utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"{what} {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {file}: not UTF-8 at byte {error.start}: save it as UTF-8") from error


def _encoded(pipeline: Any, texts: list[str], batch_size: int) -> Named:
    """By name the embeddings of texts `[N, ...]`, and with "null/" before it that of the empty text `[1, ...]`."""
    from tqdm.auto import tqdm

    # None: shown on terminals alone.
    with tqdm(total=len(texts), unit="prompt", desc="text encoders", disable=None, leave=False) as bar:
        parts = []
        for low in range(0, len(texts), batch_size):
            parts.append(_embed(pipeline, texts[low : low + batch_size]))
            bar.update(min(batch_size, len(texts) - low))
    held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return held | {f"null/{name}": tensor for name, tensor in _embed(pipeline, [""], negative=True).items()}


def _embed(pipeline: Any, texts: list[str], negative: bool = False) -> Named:
    encode = ENCODE[type(pipeline).__name__]
    with torch.no_grad():
        named = encode(pipeline, texts, negative)
    return {name: (held.float() if held.is_floating_point() else held).cpu() for name, held in named.items()}


def _clip(pipeline: Any, texts: list[str], negative: bool) -> Named:
    device = pipeline.text_encoder.device
    return {"encoder_hidden_states": pipeline.encode_prompt(texts, device, 1, negative)[int(negative)]}


def _clip_twice(pipeline: Any, texts: list[str], negative: bool) -> Named:
    device = pipeline.text_encoder.device
    encoded = pipeline.encode_prompt(texts, device=device, do_classifier_free_guidance=negative)
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    # As the pipeline gives them where its caller says nothing: original size, crop, target size.
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    return {
        "encoder_hidden_states": encoded[int(negative)],
        "added_cond_kwargs/text_embeds": encoded[2 + negative],
        "added_cond_kwargs/time_ids": ids.repeat(len(texts), 1),
    }


def _clip_and_t5(pipeline: Any, texts: list[str], negative: bool) -> Named:
    device = pipeline.text_encoder.device
    encoded = pipeline.encode_prompt(texts, None, None, device=device, do_classifier_free_guidance=negative)
    return {"encoder_hidden_states": encoded[int(negative)], "pooled_projections": encoded[2 + negative]}


def _clip_and_t5_of_flux(pipeline: Any, texts: list[str], negative: bool) -> Named:
    asked = [""] * len(texts) if negative else texts
    words, pooled, _ = pipeline.encode_prompt(asked, None, pipeline.text_encoder.device)
    return {"encoder_hidden_states": words, "pooled_projections": pooled}


ENCODE: Mapping[str, Callable[[Any, list[str], bool], Named]] = {
    "StableDiffusionPipeline": _clip,
    "StableDiffusionXLPipeline": _clip_twice,
    "StableDiffusion3Pipeline": _clip_and_t5,
    "FluxPipeline": _clip_and_t5_of_flux,
}
"""What each pipeline's networks take of its text encoders: of texts, or of what it guides away from by default."""


def _nested(flat: Named) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, tensor in flat.items():
        *outer, name = path.split("/")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = tensor
    return nested


def _is_free(cache: Path) -> bool:
    """Whether nothing is there yet. Raises ValueError where something else is."""
    if (cache / MANIFEST).is_file():
        return False
    if cache.is_file() or (cache.is_dir() and any(cache.iterdir())):
        raise ValueError(f"cache {cache} is no folder of prompts ({MANIFEST} is missing): {CURE}")
    return True


def _read(cache: Path, made_of: dict[str, str], told: dict[str, str]) -> Named:
    from safetensors.torch import load_file

    stored, file = read_json(cache / MANIFEST), cache / EMBEDDINGS
    for name, digest in made_of.items():
        if stored.get(name) != digest:
            raise ValueError(f"cache {cache} was not made with the {name} of {told[name]}: {CURE}")
    if not file.is_file() or sha256_of(file) != stored.get("sha256"):
        raise ValueError(f"cache {file} is missing or damaged: delete the folder, and it is made anew")
    return load_file(file)


def _write(cache: Path, held: Named, made_of: dict[str, str]) -> None:
    """The folder, whole or not at all."""
    from safetensors.torch import save_file

    cache.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{cache.name}.", dir=cache.parent) as place:
        whole = Path(place) / cache.name
        whole.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, whole / EMBEDDINGS)
        states = held["encoder_hidden_states"]
        facts = {"count": len(states), "max_length": states.shape[1], "sha256": sha256_of(whole / EMBEDDINGS)}
        (whole / MANIFEST).write_text(json.dumps(made_of | facts, indent=1), "utf-8")
        try:
            os.replace(whole, cache)
        except OSError:
            # Several processes may open one teacher: the first one's folder stays.
            if not (cache / MANIFEST).is_file():
                raise
