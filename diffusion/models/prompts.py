"""Prompts from a text file, encoded once by a pipeline's own text encoders, and kept where one likes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.conditions import Prompts, TextEncoders

Named = dict[str, Tensor]


def read_prompts(file: str | Path) -> list[str]:
    """One prompt a line, blank lines skipped.

    Raises:
        ValueError: no such file, not UTF-8, or no prompt in it.
    """
    file = Path(file)
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"prompts {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {file}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {file}: no prompt in it; write one a line")
    return prompts


def encode_prompts(
    pipeline: Any, encoders: TextEncoders, file: str | Path, cache: str | Path | None = None, batch_size: int = 32
) -> Prompts:
    """The prompts of a file as a pipeline's networks take them.

    Args:
        pipeline: of diffusers, with its tokenizers and text encoders.
        encoders: where these lie.
        file: of prompts, see `read_prompts`.
        cache: a safetensors file that keeps the embeddings: written if it is missing, else read.
        batch_size: prompts that are encoded at a time.

    Raises:
        ValueError: of `read_prompts`, or a cache of other encoders or prompts.
    """
    texts = read_prompts(file)
    made_of = {"encoders": encoders_hash(encoders), "prompts": hashlib.sha256("\n".join(texts).encode()).hexdigest()}
    cache = None if cache is None else Path(cache)
    if cache is not None and cache.is_file():
        held = _read(cache, made_of, {"encoders": encoders.folder, "prompts": str(file)})
    else:
        parts = [_embed(pipeline, texts[low : low + batch_size]) for low in range(0, len(texts), batch_size)]
        held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        held |= {f"null/{name}": tensor for name, tensor in _embed(pipeline, [""], negative=True).items()}
        if cache is not None:
            _write(cache, held, made_of)
    null = {name.removeprefix("null/"): tensor for name, tensor in held.items() if name.startswith("null/")}
    own = {name: tensor for name, tensor in held.items() if name in null}
    return Prompts(texts, _nested(own), _nested(null), encoders)


def encoders_hash(encoders: TextEncoders) -> str:
    """sha256 over the names and bytes of all files of the encoders and tokenizers."""
    digest = hashlib.sha256(encoders.pipeline.encode())
    for name in encoders.names:
        for file in sorted((Path(encoders.folder) / name).iterdir()):
            with file.open("rb") as opened:
                digest.update(f"{name}/{file.name}".encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _embed(pipeline: Any, texts: list[str], negative: bool = False) -> Named:
    encode = ENCODE[type(pipeline).__name__]
    with torch.no_grad():
        named = encode(pipeline, texts, negative)
    return {name: held.float() if held.is_floating_point() else held for name, held in named.items()}


def _clip(pipeline: Any, texts: list[str], negative: bool) -> Named:
    return {"encoder_hidden_states": pipeline.encode_prompt(texts, "cpu", 1, negative)[int(negative)]}


def _clip_twice(pipeline: Any, texts: list[str], negative: bool) -> Named:
    encoded = pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=negative)
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    # As the pipeline gives them where its caller says nothing: original size, crop, target size.
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    return {
        "encoder_hidden_states": encoded[int(negative)],
        "added_cond_kwargs/text_embeds": encoded[2 + negative],
        "added_cond_kwargs/time_ids": ids.repeat(len(texts), 1),
    }


def _clip_and_t5(pipeline: Any, texts: list[str], negative: bool) -> Named:
    encoded = pipeline.encode_prompt(texts, None, None, device="cpu", do_classifier_free_guidance=negative)
    return {"encoder_hidden_states": encoded[int(negative)], "pooled_projections": encoded[2 + negative]}


ENCODE: Mapping[str, Callable[[Any, list[str], bool], Named]] = {
    "StableDiffusionPipeline": _clip,
    "StableDiffusionXLPipeline": _clip_twice,
    "StableDiffusion3Pipeline": _clip_and_t5,
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


def _read(cache: Path, made_of: dict[str, str], told: dict[str, str]) -> Named:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(cache, "pt") as opened:
            stored = json.loads((opened.metadata() or {}).get("made_of", "{}"))
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise ValueError(f"cache {cache} is not a readable safetensors file: {error}") from error
    for name, digest in made_of.items():
        if stored.get(name) != digest:
            raise ValueError(f"cache {cache} was not made with the {name} of {told[name]}: delete it, or name another")
    return held


def _write(cache: Path, held: Named, made_of: dict[str, str]) -> None:
    from safetensors.torch import save_file

    cache.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cache.with_name(f".{cache.name}.unfinished")
    tensors = {name: tensor.contiguous() for name, tensor in held.items()}
    save_file(tensors, unfinished, {"made_of": json.dumps(made_of)})
    unfinished.replace(cache)
