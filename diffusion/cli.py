"""The commands that `diffusion` adds to the console command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiondistill.options import options_of

if TYPE_CHECKING:
    from diffusion.generator import Generator


def demo_ring(words: list[str]) -> int:
    """usage: visiondistill demo ring [--output_dir DIR] [--seed N]

    Distils the exact many-step diffusion model of a ring of eight Gaussians by DMD2 into a
    one-step student, and compares both with the data: a table, and a picture in DIR (default
    runs/ring). Takes two minutes on one core.
    """
    options = options_of(words, demo_ring, {"output_dir": "runs/ring", "seed": 0})
    if options is None:
        return 0
    from diffusion.toys import run_ring

    metrics = run_ring(options["seed"], options["output_dir"])
    _print_table(metrics)
    print(f"picture: {Path(options['output_dir']) / 'ring.png'}")
    return 0


def demo_diffusion(words: list[str]) -> int:
    """usage: visiondistill demo diffusion [--output_dir DIR] [--seed N]

    Trains a small diffusion model on real handwritten digits, distils it into a generator of one
    to four steps (DMD2 with DMD's regression), exports both as pipelines of diffusers, and compares
    them: a table, and a picture in DIR (default runs/demo_diffusion). About ten minutes on two cores.
    """
    options = options_of(words, demo_diffusion, {"output_dir": "runs/demo_diffusion", "seed": 0})
    if options is None:
        return 0
    from rich.console import Console

    from diffusion.demo import run_demo
    from diffusion.eval import comparison_table

    folder = Path(options["output_dir"])
    reports = run_demo(folder, options["seed"])
    Console().print(comparison_table(reports))
    many, *few = [report.images_per_second for report in reports.values()]
    print(f"images per second, student over teacher: {', '.join(f'{speed / many:.1f}' for speed in few)}")
    print(f"picture: {folder / 'digits.png'}")
    return 0


def evaluate(topic: str, words: list[str]) -> int:
    """usage: visiondistill evaluate fd|kid|pr --run DIR | --pipeline FOLDER [--data.root DIR]
                  [--extractor squeezenet|random|timm:NAME|FOLDER] [--extractor_weights FILE] [--classifier FOLDER]
                  [--count N] [--steps N] [--seed S] [--batch_size B] [--split test]
                  [--output_dir DIR] [--cache_dir DIR] [--generator.guidance_scale S] [--generator.prompts FILE]
              visiondistill evaluate fid --extractor_weights FILE ...

    Samples a generator and compares its images with the real ones of a data set: fd is the Frechet
    distance and the diversity of features, kid the kernel distance, pr precision and recall; fid
    is fd of the published Inception network, whose file must be named. Beside every figure stands
    what real images score in the generator's place. FOLDER is an export of a classifier, or a run
    of one; --classifier adds the accuracy of its answers on class-conditional samples. Data are
    the run's, --data.KEY overrides them; --generator.KEY says how the pipeline is opened. --steps 0,
    the default, takes the generator's own number. A run without an export is built again and gets
    its newest whole checkpoint: --generator.use ema|raw says which weights, and
    --generator.changes "{data.root: DIR}" what of its recipe lies elsewhere by now (default: --data.KEY).
    The report goes to DIR, by default `evaluation` in the run or pipeline; features of the real
    images are kept beside that, in `reference_features`.
    """
    options = {"run": None, "pipeline": None, "extractor": None, "extractor_weights": None}
    options |= {"classifier": None, "count": 2000, "steps": 0, "seed": 0, "batch_size": 64, "split": "test"}
    chosen = options_of(
        words, evaluate, options | {"output_dir": None, "cache_dir": None}, dotted=("data", "generator")
    )
    if chosen is None:
        return 0
    from rich.console import Console

    from diffusion.eval.command import run_evaluation

    report, path = run_evaluation(topic, **chosen)
    Console().print(report.table())
    print(f"report: {path}")
    return 0


evaluate_fd, evaluate_fid, evaluate_kid, evaluate_pr = (
    partial(evaluate, topic) for topic in ("fd", "fid", "kid", "pr")
)


def store_pairs(words: list[str]) -> int:
    """usage: visiondistill store pairs --run DIR | --pipeline FOLDER --output_dir DIR [--count N] [--steps N]
                                          [--seed S] [--batch_size B] [--generator.KEY VALUE]

    Keeps pairs of noise and what a generator of many steps makes of it, for DMD's regression
    (recipe dmd, --method.regression.pairs DIR). Pair i depends on the seed and i alone: an
    interrupted store goes on, a larger --count adds to it, another generator's is refused. Of a run
    without an export the newest whole checkpoint is taken, as by `evaluate fd`.
    """
    options = {"run": None, "pipeline": None, "output_dir": None, "count": 4000, "steps": 0, "seed": 0}
    chosen = options_of(words, store_pairs, options | {"batch_size": 64}, dotted=("generator",))
    if chosen is None:
        return 0
    from diffusion import pairs
    from diffusion.subject import generator_of
    from visiondistill.schema import RecipeError

    folder = _named(chosen, "output_dir", "DIR")
    generator = generator_of(chosen["run"], chosen["pipeline"], chosen["changes"])
    said = {name: chosen[name] for name in ("seed", "batch_size")}
    try:
        pairs.store_pairs(_on_device(generator), chosen["count"], folder, steps=chosen["steps"] or None, **said)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(f"{chosen['count']} pairs: {folder}")
    return 0


def store_prompts(words: list[str]) -> int:
    """usage: visiondistill store prompts --pipeline FOLDER --prompts FILE --output_dir DIR [--batch_size B]

    Encodes the prompts of FILE, one a line, by a pipeline's text encoders alone, and keeps the
    embeddings in DIR. A teacher that is opened with both (--teacher.prompts FILE --teacher.cache DIR)
    then loads no text encoder. A DIR of other encoders or other prompts is refused.
    """
    options = {"pipeline": None, "prompts": None, "output_dir": None, "batch_size": 32}
    chosen = options_of(words, store_prompts, options)
    if chosen is None:
        return 0
    from diffusion.models import folder as folders
    from visiondistill.engine.launch import launch
    from visiondistill.schema import RecipeError

    pipeline = _named(chosen, "pipeline", "FOLDER", "name the pipeline")
    file = _named(chosen, "prompts", "FILE", "name the prompts")
    folder = _named(chosen, "output_dir", "DIR")
    try:
        kept = folders.store_prompts(pipeline, file, folder, batch_size=chosen["batch_size"], device=launch().device)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(f"{len(kept.texts)} prompts: {folder}")
    return 0


def store_latents(words: list[str]) -> int:
    """usage: visiondistill store latents --run DIR | --pipeline FOLDER --file FILE [--data.KEY VALUE]
                                            [--split train] [--batch_size B] [--generator.KEY VALUE]
                                            [--captions FILE --generator.prompts FILE]

    Encodes the images of a data set once by a pipeline's VAE, so that training need not: at the end
    stand the options by which `train` reads FILE (its data are then diffusion.models.CachedLatents).
    Another VAE or other images are refused when FILE is used.
    Captions, one a line for each image that the data list, in their order, tell a text-conditional
    generator which of its prompts an image shows: all of them must be among its prompts.
    """
    options = {"run": None, "pipeline": None, "file": None, "split": "train", "batch_size": 32, "captions": None}
    chosen = options_of(words, store_latents, options, dotted=("data", "generator"))
    if chosen is None:
        return 0
    from diffusion.codecs import Pixels
    from diffusion.models import cache_latents
    from diffusion.models.prompts import read_captions
    from diffusion.subject import data_config, generator_of
    from visiondistill.recipes import source_of
    from visiondistill.schema import RecipeError

    file = _named(chosen, "file", "FILE")
    generator = generator_of(chosen["run"], chosen["pipeline"], chosen["changes"])
    if isinstance(generator.codec, Pixels):
        raise RecipeError("this generator works on pixels: it has no VAE, and there is nothing to encode")
    config = data_config(chosen["run"], chosen["changes"])
    source = source_of(config)
    said = {name: chosen[name] for name in ("split", "batch_size")}
    try:
        captions = None if chosen["captions"] is None else read_captions(chosen["captions"])
        kept = cache_latents(_on_device(generator), source, file, captions=captions, **said)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(f"{len(kept)} latents of {list(generator.shape)}: {file}")
    if chosen["split"] == "train":
        print(f"to train on them, give `visiondistill train` these options: {_reading_latents(config['data'], file)}")
    return 0


def _reading_latents(data: dict[str, Any], file: str) -> str:
    """Options of `train` that put stored latents in the place of the training images of `data`."""
    import json
    import shlex

    source = json.dumps(data, ensure_ascii=False)
    words = ["--data.class_path", "diffusion.models.CachedLatents", "--data.source", source, "--data.file", file]
    return shlex.join(words)


def _named(options: dict[str, Any], name: str, what: str, ask: str = "say where to") -> str:
    from visiondistill.schema import RecipeError

    if options[name] is None:
        raise RecipeError(f"{ask}: --{name} {what}")
    return options[name]


def _on_device(generator: Generator) -> Generator:
    from visiondistill.engine.launch import launch

    return generator.to(launch().device)


def _print_table(metrics: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(next(iter(metrics.values())))
    table = Table(title="8,000 samples against the data")
    for column in ("", *names):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for who, values in metrics.items():
        table.add_row(who, *(f"{values[name]:.4g}" for name in names))
    Console().print(table)
