"""A pipeline folder of diffusers as a generator: any network with its scheduler, autoencoder and text encoders."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.codecs import Codec, Latents, Pixels
from diffusion.conditions import ClassLabels, Conditions, Prompts, TextEncoders
from diffusion.denoiser import Denoiser, EDMPreconditioner, Interval
from diffusion.generator import Generator, Sampler
from diffusion.models.networks import DiffusersNetwork, checkpoint_gradients
from diffusion.models.prompts import ENCODE, encode_prompts, read_prompts
from diffusion.models.quiet import without_bars
from diffusion.models.schedulers import Noising, read_json, read_scheduler
from diffusion.process import FlowProcess
from visiondistill.exported import FACTS

INDEX = "model_index.json"

DENOISERS = ("unet", "transformer")
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that make no image: they are not loaded."""

WEIGHTS = ("diffusion_pytorch_model", "model")


class Pipeline(Generator):
    """A pipeline folder of diffusers.

    The scheduler's fields give the noise path and the prediction type; weights are read from
    safetensors alone. What the folder lacks or what is not understood in it is refused before
    anything is loaded.

    Args:
        folder: with model_index.json.
        num_classes: of a class-conditional network, where its label table holds a null label besides;
            default: the whole table of a UNet2DModel, which then cannot be guided.
        prompts: file for a text-conditional pipeline, one prompt a line.
        cache: folder that keeps the prompts' embeddings, see `encode_prompts`; where it has them, no text
            encoder is loaded.
        steps: it samples with; default the number that an export of ours names, else 4 for a folder
            that samples in a few steps, else 50.
        sampler: default "student" for a folder that samples in a few steps.
        guidance_scale, guidance_interval, guidance_rescale: as of `Generator`.
        gradient_checkpointing: recompute activations in backward passes.
        embedded_guidance: that a network which takes its guidance scale as an input always gets, such as a
            distilled Flux; see `DiffusersNetwork`.

    Attributes:
        notes: what the folder's own pipeline does besides, for a preflight.

    Raises:
        ValueError: a file that is missing, damaged or a pickle; a pipeline, scheduler or part that is not
            known; labels or prompts that do not fit the network.
    """

    def __init__(
        self,
        folder: str,
        num_classes: int | None = None,
        prompts: str | None = None,
        cache: str | None = None,
        steps: int | None = None,
        sampler: Sampler = "auto",
        guidance_scale: float = 1.0,
        guidance_interval: Interval | None = None,
        guidance_rescale: float = 0.0,
        gradient_checkpointing: bool = False,
        embedded_guidance: float | None = None,
    ) -> None:
        place = Path(folder)
        index, facts = read_index(place), _facts(place)
        parts = _parts(place, index)
        _check_prompts(place, parts, prompts)
        noising = read_scheduler(place / "scheduler")
        _check_weights_of(place, parts)
        # Before the others are loaded: the text encoders are not needed any more then.
        words = None if prompts is None else _prompts(place, index, parts, prompts, cache)
        models = {name: load_model(place / name, index[name]) for name in parts if name not in TEXT}
        network = models["unet" if "unet" in models else "transformer"]
        _check_network(network, place)
        codec: Codec = Latents(models["vae"]) if "vae" in models else Pixels()
        told = num_classes if num_classes is not None else facts.get("num_classes")
        conditions = _labels(place, network, told) if words is None else words
        if guidance_scale != 1 and isinstance(conditions, ClassLabels) and not conditions.null:
            raise ValueError(
                f"{place}: guidance_scale={guidance_scale} needs a null label, and all {conditions.num_classes} rows "
                f"of its table are taken for classes: say num_classes={conditions.num_classes - 1} if the last is null"
            )
        few = noising.few_steps
        denoiser = _denoiser(network, noising, facts, embedded_guidance)
        super().__init__(
            checkpoint_gradients(denoiser) if gradient_checkpointing else denoiser,
            _shape(network, codec),
            codec=codec,
            conditions=conditions,
            steps=steps or facts.get("steps") or (4 if few else 50),
            sampler="student" if few and sampler == "auto" else sampler,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )
        self.folder, self.notes = str(folder), noising.notes

    @property
    def finetune_command(self) -> str:
        """Of a table that is taken for classes alone, first what makes its last row the null label."""
        labels = self.conditions
        if not isinstance(labels, ClassLabels) or labels.null:
            return Generator.finetune_command
        last = labels.num_classes - 1
        return (
            f"--teacher.num_classes {last} (where the last of its {last + 1} labels is a null label), or\n"
            f"  {Generator.finetune_command}"
        )


def open_generator(folder: str | Path, **options: Any) -> Generator:
    """A pipeline folder of diffusers as a generator; options as of `Pipeline`."""
    return Pipeline(str(folder), **options)


def store_prompts(
    folder: str | Path,
    file: str | Path,
    path: str | Path,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Encode the prompts of a file by a pipeline's text encoders alone, and keep them in the folder `path`.

    `open_generator(folder, prompts=file, cache=path)` then loads no text encoder. What is there
    already is read.

    Args:
        folder: of the pipeline.
        file, path, batch_size: as of `encode_prompts`.
        device: of the encoders.

    Raises:
        ValueError: a pipeline without text encoders or that is partly filled, and whatever `encode_prompts` refuses.
    """
    place = Path(folder)
    index = read_index(place)
    parts = _parts(place, index)
    _check_prompts(place, parts, str(file))
    _check_weights_of(place, parts)
    return _prompts(place, index, parts, str(file), str(path), batch_size, device)


def _check_weights_of(folder: Path, parts: list[str]) -> None:
    for name in parts:
        if not name.startswith("tokenizer"):
            check_weights(folder / name)


def check_weights(folder: Path) -> None:
    """See that a part's config and safetensors are there, all shards of them.

    Raises:
        ValueError: they are not; the message names the file and the cure.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'} is missing: the folder is partly filled, fetch it again")
    for stem in WEIGHTS:
        if (folder / f"{stem}.safetensors").is_file():
            return
        shards = folder / f"{stem}.safetensors.index.json"
        if shards.is_file():
            named = sorted(set(read_json(shards)["weight_map"].values()))
            if missing := [name for name in named if not (folder / name).is_file()]:
                raise ValueError(
                    f"{folder / missing[0]} is missing ({len(named) - len(missing)} of {len(named)} shards are there): "
                    f"the folder is partly filled, fetch it again"
                )
            return
    pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".ckpt", ".pth", ".pt")]
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which is not opened: convert it to {WEIGHTS[0]}.safetensors"
        )
    other = [file.name for file in folder.glob("*.safetensors")]
    hint = f"; {other[0]} is another variant: rename it" if other else ": the folder is partly filled, fetch it again"
    raise ValueError(f"{folder} holds no {WEIGHTS[0]}.safetensors{hint}")


def load_model(folder: Path, source: list[str]) -> nn.Module:
    """One part of a pipeline, in float32 and eval mode, every one of its tensors from the files.

    Raises:
        ValueError: an unknown class, or files that lack tensors, have others, or cannot be read.
    """
    library, kind = source[0], _class_of(folder, source)
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    precision = "dtype" if library == "transformers" else "torch_dtype"
    try:
        with without_bars():
            model, info = kind.from_pretrained(folder, **{precision: torch.float32}, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded (where a file is damaged, fetch it again): {error}") from error
    wrong = {which: sorted(map(str, info[f"{which}_keys"])) for which in ("missing", "mismatched", "unexpected")}
    if library == "transformers":
        wrong.pop("unexpected")  # older files hold buffers that are computed now
    for which, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{folder}: {len(keys)} {which} tensors, such as {keys[0]}: its files do not fit its config"
            )
    return model.eval()


def _class_of(folder: Path, source: list[str]) -> Any:
    from importlib import import_module

    library, name = source
    if library not in ("diffusers", "transformers") or not hasattr(module := import_module(library), name):
        raise ValueError(f"{folder}: {library}.{name} is not known; parts are classes of diffusers and transformers")
    return getattr(module, name)


def read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"{file} is missing: name the folder of a whole diffusers pipeline")
    return read_json(file)


def _facts(folder: Path) -> dict[str, Any]:
    """What an export of ours says of itself; nothing for other folders."""
    file = folder / FACTS
    return read_json(file) if file.is_file() else {}


def _parts(folder: Path, index: dict[str, Any]) -> list[str]:
    """Names of the parts that are loaded, each with a folder."""
    there = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    allowed = (*DENOISERS, *TEXT, *LEFT_OUT, "vae", "scheduler")
    if unknown := sorted(set(there) - set(allowed)):
        raise ValueError(f"{folder / INDEX}: the part {unknown[0]!r} of {index.get('_class_name')} is not supported")
    if "scheduler" not in there or len(set(there) & set(DENOISERS)) != 1:
        raise ValueError(f"{folder / INDEX} must name a scheduler and one of {', '.join(DENOISERS)}, it names {there}")
    parts = [name for name in there if name not in (*LEFT_OUT, "scheduler")]
    for name in parts:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is missing: the folder is partly filled, fetch it again")
    if "text_encoder" in parts and index["_class_name"] not in ENCODE:
        raise ValueError(
            f"{folder / INDEX}: prompts of {index['_class_name']} are not supported; of {', '.join(ENCODE)}"
        )
    return parts


def _check_prompts(folder: Path, parts: list[str], prompts: str | None) -> None:
    if "text_encoder" in parts and prompts is None:
        raise ValueError(
            f"{folder} is conditioned on text: give `prompts`, a file with one prompt a line (--generator.prompts FILE "
            f"for evaluate and store, --teacher.prompts FILE for train)"
        )
    if "text_encoder" not in parts and prompts is not None:
        raise ValueError(f"prompts={prompts}: {folder} has no text encoder")
    if prompts is not None:
        read_prompts(prompts)


def _check_network(network: nn.Module, folder: Path) -> None:
    projection = getattr(getattr(network, "time_embedding", None), "cond_proj", None)
    if projection is not None and projection.weight.abs().max() > 0:
        raise ValueError(
            f"{folder}: the network takes its guidance scale as an input (time_cond_proj_dim), which is not supported"
        )


def _denoiser(network: nn.Module, noising: Noising, facts: dict[str, Any], embedded_guidance: float | None) -> Denoiser:
    if "shift" in facts:  # in grids of ours the shift is part of what stands in the scheduler
        noising = replace(noising, process=FlowProcess(facts["shift"]))
    adapted: nn.Module = DiffusersNetwork(network, noising.time_scale, embedded_guidance=embedded_guidance)
    if noising.sigma_data is not None:
        adapted = EDMPreconditioner(adapted, noising.sigma_data, facts.get("sigma_min", noising.process.min_t))
    return Denoiser(adapted, noising.process, noising.prediction_type)


def _shape(network: nn.Module, codec: Codec) -> tuple[int, ...]:
    if "sample_size" not in network.config and isinstance(codec, Latents):  # of any size, as Flux: the autoencoder's
        vae = codec.vae.config
        side = vae.sample_size // 2 ** (len(vae.block_out_channels) - 1)
        return (vae.latent_channels, side, side)
    size = network.config.get("sample_size")
    if size is None:
        raise ValueError(f"config.json of {type(network).__name__} says no sample_size: write its images' side there")
    height, width = (size, size) if isinstance(size, int) else size
    return (network.config.in_channels, height, width)


def _prompts(
    folder: Path,
    index: dict[str, Any],
    parts: list[str],
    prompts: str,
    cache: str | None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Prompts:
    encoders = TextEncoders(str(folder), index["_class_name"], tuple(name for name in TEXT if name in parts))
    opened = partial(_text_pipeline, folder, index, parts, device)
    return encode_prompts(opened, encoders, prompts, cache, batch_size)


def _text_pipeline(folder: Path, index: dict[str, Any], parts: list[str], device: torch.device | str) -> Any:
    """The folder's pipeline with the weights of its text encoders alone; it asks the other parts for their sizes."""
    from accelerate import init_empty_weights

    models = {}
    for name in parts:
        if name in TEXT and not name.startswith("tokenizer"):
            models[name] = load_model(folder / name, index[name]).to(device)
        elif name not in TEXT:
            kind = _class_of(folder / name, index[name])
            with init_empty_weights():
                models[name] = kind.from_config(read_json(folder / name / "config.json"))
    return assemble(folder, models)


def _labels(folder: Path, network: nn.Module, num_classes: int | None) -> Conditions | None:
    table, null = _label_table(network)
    if table is None:
        if num_classes is not None:
            raise ValueError(
                f"num_classes={num_classes}: the network in {folder} takes no class labels: say num_classes=null, also "
                f"where the data have classes"
            )
        return None
    classes = num_classes if num_classes is not None else table - null
    if not table - 1 <= classes <= table:
        raise ValueError(
            f"num_classes={classes} is not allowed: {folder} has a table of {table} labels, so {table - 1} (and a null "
            f"label) or {table}"
        )
    return ClassLabels(classes, null=classes < table)


def _label_table(network: nn.Module) -> tuple[int | None, int]:
    """Rows of the network's table of labels, and how many of these are known to be null labels."""
    if (rows := getattr(network.config, "num_class_embeds", None)) is not None:
        return rows, 0
    tables = [part.embedding_table for part in network.modules() if hasattr(part, "embedding_table")]
    return (tables[0].num_embeddings, 1) if tables else (None, 0)


def assemble(folder: Path, models: dict[str, Any]) -> Any:
    """The folder's pipeline around models that are loaded, its other parts from the folder."""
    index = read_index(folder)
    empty = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    absent = empty | {name: None for name in LEFT_OUT if name in index}
    return pipeline_of(folder, **absent | models)


def pipeline_of(folder: Path, **parts: Any) -> Any:
    """The folder as diffusers opens it, around those parts that are given."""
    import diffusers

    with without_bars():
        return diffusers.DiffusionPipeline.from_pretrained(folder, **parts, use_safetensors=True, local_files_only=True)
