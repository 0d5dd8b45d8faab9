"""The console command. The verb is dispatched before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from visiondistill.options import asks_help, options_of

COMMANDS = "visiondistill.commands"
"""Entry-point group by which other packages add commands."""

USAGE = """usage: visiondistill <verb> [options]

  demo [--output_dir DIR] [--seeds N]       a first distillation on real digits, in minutes on a CPU
  demo diffusion|ring [--output_dir DIR]    generators of few steps distilled from many-step ones
  train --recipe NAME|FILE [--key value]    run a recipe; dotted keys override it (--run.seed 1)
  finetune [--key value]                    train --recipe finetune: a teacher for the classes of your folder
  evaluate accuracy|cost --run DIR          measure a run again (or --model NAME --data.root DIR)
  evaluate fd|fid|kid|pr --run DIR          the images of a generator beside real ones (or --pipeline FOLDER)
  store --run DIR --file FILE               a teacher's logits on its training images, for the recipe `stored`
  store pairs|latents|prompts ...           a generator's samples with their noise; images or texts, encoded once
  export --run DIR [--onnx true]            export what a run made (again), from its checkpoint
  compare --file NAME|FILE [--seeds N]      recipes x seeds on one pair and budget, with intervals
  methods [NAME]                            the recipes that there are, or one of them whole
  benchmark step|performance                the loop's cost against a hand-written one; what switches gain

  visiondistill <verb> --help               what a verb takes
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0 done, 2 wrong input, 3 not finite, 4 out of memory, 5 disk full, 128 + n on signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    from visiondistill.schema import RecipeError

    try:
        return _dispatch(words)
    except RecipeError as error:
        print(f"visiondistill {words[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe has seen enough (`visiondistill methods | head`); Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, which not every system has
    except Exception as error:
        # Errors of the engine carry their exit code; anything else is a defect and keeps its traceback.
        if not hasattr(error, "exit_code"):
            raise
        print(f"visiondistill {words[0]}: {error}", file=sys.stderr)
        return error.exit_code


def _dispatch(words: list[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int]] = {
        "demo": demo,
        "train": train,
        "finetune": finetune,
        "evaluate": evaluate,
        "store": store,
        "export": export,
        "compare": compare,
        "methods": methods,
        "benchmark": benchmark,
    }
    foreign = _foreign(words)
    if foreign is not None:
        return foreign(words[2:])
    if words[0] in verbs:
        return verbs[words[0]](words[1:])
    from visiondistill.schema import nearest

    close = nearest(words[0], verbs)
    print(f"visiondistill: unknown verb {words[0]!r}{close}; there are {', '.join(verbs)}", file=sys.stderr)
    return 2


def _foreign(words: list[str]) -> Callable[[list[str]], int] | None:
    """The command "verb topic" that another package adds, as its entry point "verb.topic".

    Raises:
        RecipeError: the package is not what it was when it was installed.
    """
    if len(words) < 2 or words[1].startswith("-"):
        return None
    found = next(iter(entry_points(group=COMMANDS, name=f"{words[0]}.{words[1]}")), None)
    if found is None:
        return None
    from visiondistill.schema import RecipeError, shadowed

    try:
        return found.load()
    except Exception as error:
        cure = shadowed(found.module)
        if not isinstance(error, ImportError | AttributeError) and not cure:
            raise
        raise RecipeError(f"{words[1]}: {found.value} cannot be imported: {error}{cure}") from error


def _topics(verb: str, own: Sequence[str] = ()) -> list[str]:
    """What may follow a verb, of this package and of others."""
    added = [entry.name for entry in entry_points(group=COMMANDS)]
    return [*own, *sorted({name.partition(".")[2] for name in added if name.startswith(f"{verb}.")} - set(own))]


def _check_topic(verb: str, words: list[str], own: Sequence[str] = ()) -> None:
    from visiondistill.schema import RecipeError, nearest

    topics = _topics(verb, own)
    if words and not words[0].startswith("-") and words[0] not in own:
        raise RecipeError(f"no topic {words[0]!r}{nearest(words[0], topics)}; there are {', '.join(topics) or 'none'}")
    if own and (not words or words[0] not in own):
        raise RecipeError(f"say what: {verb} {'|'.join(topics)}")


def train(words: list[str]) -> int:
    """usage: visiondistill train --recipe NAME|FILE [--dry-run] [--dotted.key value ...]

    Runs a recipe. Every key of the recipe can be overridden: --run.output_dir runs/mine
    --run.seed 1 --stages.student.steps 2000. The resolved recipe, with every default written out
    below what was chosen, is saved as config.yaml in the run folder; train --recipe that/file
    repeats the run, --run.resume auto continues it.
    --dry-run stops after the preflight, which says what would be trained on what, at which cost.
    """
    if asks_help(words, train):
        return 0
    from visiondistill import recipes

    words = [f"{word}=true" if word == "--dry-run" else word for word in words]
    changes = recipes.parse_overrides(words)
    if "recipe" not in changes:
        raise recipes.RecipeError("name a recipe: --recipe smoke/kd, or a YAML file")
    dry_run = bool(changes.pop("dry-run", False))
    config = recipes.override(recipes.load(str(changes.pop("recipe"))), changes)
    from visiondistill.engine.across import process_index
    from visiondistill.engine.checkpoints import step_name
    from visiondistill.workbench import run

    outcome = run(config, dry_run)
    if outcome is None:
        return 0
    result = outcome.result
    finished = result.reason == "finished"
    if process_index() == 0:
        print(f"{result.reason} after step {result.step}; run folder {result.output_dir}")
        saved = result.output_dir / "checkpoints" / step_name(result.step)
        if not finished and saved.is_dir():
            print(f"kept as {saved}; the same command with --run.resume auto goes on from there")
    return 0 if finished else 128 + signal.Signals[result.reason]


def finetune(words: list[str]) -> int:
    """usage: visiondistill finetune [--dotted.key value ...]

    The same as train --recipe finetune: puts a new head on a pretrained timm model, for the
    classes of your folder (--student.name NAME --data.root DIR).
    """
    if asks_help(words, finetune):
        return 0
    if any(word.partition("=")[0] == "--recipe" for word in words):
        from visiondistill.schema import RecipeError

        raise RecipeError("--recipe: finetune is a recipe itself; others are run by train --recipe NAME")
    return train(["--recipe", "finetune", *words])


def evaluate(words: list[str]) -> int:
    """usage: visiondistill evaluate accuracy --run DIR [--data.root DIR] [--output_dir DIR]
              visiondistill evaluate accuracy --model NAME|FOLDER --data.root DIR [--output_dir DIR]
              visiondistill evaluate cost --run DIR | --model NAME|FOLDER [--onnx true] [--seconds S]
                                          [--batch_size N] [--output_dir DIR]

    accuracy: top-1/5, NLL, calibration, agreement with the teacher, per-class table and plots on
    the test images. cost: parameters, operations, latency and throughput; with --onnx true also as
    ONNX in float32 and int8 (needs the extra "export", and training images: --data.root).
    A run is measured by its export; FOLDER is any export. Reports go to DIR, by default
    `evaluation` in the run folder or here.
    """
    if asks_help(words, evaluate):
        return 0
    _check_topic("evaluate", words, ("accuracy", "cost"))
    options: dict[str, Any] = {"run": None, "model": None, "output_dir": None}
    if words[0] == "cost":
        options |= {"onnx": False, "seconds": 3.0, "batch_size": 64}
    chosen = options_of(words[1:], evaluate, options, dotted=("data", "teacher"))
    from rich.console import Console

    from visiondistill import measure
    from visiondistill.eval import cost_table

    if words[0] == "cost":
        Console().print(cost_table(measure.cost(**chosen)))
    else:
        report = measure.accuracy(**chosen)
        Console().print(report.table(), report.class_table())
    return 0


def store(words: list[str]) -> int:
    """usage: visiondistill store --run DIR --file FILE.safetensors [--data.root DIR]
              visiondistill store --model NAME|FOLDER --data.root DIR --file FILE.safetensors

    Asks a run's export, any other export or a timm model about the training images and their mirror
    images once and writes its logits to FILE, which then teaches in its place:
    train --recipe stored --teacher.file FILE.
    """
    options = options_of(words, store, {"file": None, "run": None, "model": None}, dotted=("data", "teacher"))
    if options is None:
        return 0
    from visiondistill import measure
    from visiondistill.schema import RecipeError

    if options["file"] is None:
        raise RecipeError("name the file to write: --file FILE.safetensors")
    print(f"logits of {measure.store(**options)} images: {options['file']}")
    return 0


def export(words: list[str]) -> int:
    """usage: visiondistill export --run DIR [--output_dir DIR] [--weights auto|ema|raw] [--onnx true]
                                   [--checkpoint DIR] [--data.root DIR]

    Exports what a run made, from its newest whole checkpoint (or the one named): also a run that
    was killed, or again in another form. It goes to DIR, by default `export` in the run folder,
    where it replaces the one that is there. --weights auto takes the average where one was kept.
    --data.KEY and --teacher.KEY override the recipe, for files that lie elsewhere by now.
    """
    names = ("run", "output_dir", "checkpoint")
    options = options_of(
        words, export, dict.fromkeys(names) | {"weights": "auto", "onnx": False}, dotted=("data", "teacher")
    )
    if options is None:
        return 0
    from visiondistill.schema import RecipeError

    if options["run"] is None:
        raise RecipeError("name the run: --run FOLDER")
    from visiondistill.publish import export_again

    exported = export_again(folder=options.pop("output_dir"), **options)
    print(f"export ({exported.format}, {exported.weights} weights): {exported.folder}")
    return 0


def compare(words: list[str]) -> int:
    """usage: visiondistill compare --file NAME|FILE [--arms "[kd, pld]"] [--seeds N] [--output_dir DIR]
                                     [--only_arms "[pld]"] [--only_seeds "[0, 1]"] [--dotted.key value ...]

    Runs several recipes on one teacher, student and budget, each with the same seeds, and writes a
    table, a picture and compare.json: mean and spread, the paired difference to the reference with
    its 95 % interval, calibration, agreement with the teacher, the cost of a step. Runs that are
    finished are not run again; after an interruption the same command goes on. Dotted keys
    override the pair of all arms (--data.root DIR, --steps 1000).
    --only_arms and --only_seeds run a part and write no table: several processes can share the
    work so, each with a part of its own. Where arms are tuned, the seed of the trials comes first.
    """
    if asks_help(words, compare):
        return 0
    from visiondistill import recipes
    from visiondistill.compare import compare as run_all
    from visiondistill.compare import load, run
    from visiondistill.engine.across import process_index
    from visiondistill.summaries import table

    changes = recipes.parse_overrides(words)
    if "file" not in changes:
        raise recipes.RecipeError("name a comparison: --file NAME, or a YAML file")
    part = [changes.pop(name, None) for name in ("only_arms", "only_seeds")]
    comparison, say = load(str(changes.pop("file")), changes), partial(print, flush=True)
    try:
        if part != [None, None]:
            run(comparison, *part, say)
            return 0
        summaries = run_all(comparison, say)
    except KeyboardInterrupt as signalled:
        print(f"visiondistill compare: {signalled}; the same command goes on from there", file=sys.stderr)
        return 128 + signal.SIGINT
    if process_index() == 0:
        from rich.console import Console

        Console().print(table(summaries, comparison.reference))
        print(f"results: {comparison.folder}")
    return 0


def methods(words: list[str]) -> int:
    """usage: visiondistill methods [NAME]

    Lists the recipes that come with the package: name, title, paper, file. With a name (or a file):
    what the recipe is, the classes that carry its idea and where they are defined, and its
    settings with its bases merged in.
    """
    if asks_help(words, methods):
        return 0
    from visiondistill import catalogue
    from visiondistill.schema import RecipeError

    if len(words) > 1:
        raise RecipeError(f"{words[1]!r} is too much: one recipe at a time")
    print(catalogue.description(words[0]) if words else catalogue.listing())
    return 0


def demo(words: list[str]) -> int:
    """usage: visiondistill demo [--output_dir DIR] [--seeds N]

    Trains a teacher on real handwritten digits, then a small student without and with it, and
    shows the difference: a table, and a plot in DIR (default runs/demo).
    """
    _check_topic("demo", words)
    options = options_of(words, demo, {"output_dir": "runs/demo", "seeds": 3})
    if options is None:
        return 0
    from visiondistill.demo import run_demo

    run_demo(Path(options["output_dir"]), seeds=range(options["seeds"]))
    return 0


def benchmark(words: list[str]) -> int:
    """usage: visiondistill benchmark step [--pairs N]
              visiondistill benchmark performance [--student NAME] [--teacher NAME] [--size N] [--batch_size N]

    step: times the engine's loop against a hand-written loop that does the same work, interleaved,
    and prints the ratios. performance: tries the switches of `performance: auto` on a pair of timm
    models with random weights and images, and prints what a step takes with each.
    """
    if asks_help(words, benchmark):
        return 0
    _check_topic("benchmark", words, ("step", "performance"))
    own = {
        "step": {"pairs": 60},
        "performance": {"student": "resnet18", "teacher": "resnet50", "size": 96, "batch_size": 16},
    }
    options = options_of(words[1:], benchmark, own[words[0]])
    from visiondistill.benchmark import benchmark_performance, benchmark_step

    {"step": benchmark_step, "performance": benchmark_performance}[words[0]](**options)
    return 0
