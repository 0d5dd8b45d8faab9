"""The console command. The verb is dispatched before anything heavy is imported."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from visiondistill.options import asks_help, help_of, options_of

COMMANDS = "visiondistill.commands"
"""Entry-point group by which other packages add commands."""

USAGE = """usage: visiondistill <verb> [options]

  demo [--output_dir DIR] [--seeds N]       a first distillation on real digits, in minutes on a CPU
  demo ring [--output_dir DIR] [--seed N]   a one-step generator distilled from a many-step teacher
  train --recipe NAME|FILE [--key value]    run a recipe; dotted keys override it (--run.seed 1)
  finetune [--key value]                    train --recipe finetune: a teacher for the classes of your folder
  evaluate accuracy|cost --run DIR          measure a run again (or --model NAME --data.root DIR)
  methods [NAME]                            the recipes that there are, or one of them whole
  benchmark step                            the loop's cost against a hand-written one

  visiondistill <verb> --help               what a verb takes
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 2 wrong input, 3 not finite, 128 + n on signal n)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbs: dict[str, Callable[[list[str]], int]] = {
        "demo": demo,
        "train": train,
        "finetune": finetune,
        "evaluate": evaluate,
    }
    verbs |= {"methods": methods, "benchmark": benchmark}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    foreign = _foreign(words)
    if foreign is None and words[0] not in verbs:
        print(f"visiondistill: unknown verb {words[0]!r}; there are {', '.join(verbs)}", file=sys.stderr)
        return 2
    from visiondistill.schema import RecipeError

    try:
        return foreign(words[2:]) if foreign is not None else verbs[words[0]](words[1:])
    except RecipeError as error:
        print(f"visiondistill {words[0]}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        # Errors of the engine carry their exit code; anything else is a defect and keeps its traceback.
        if not hasattr(error, "exit_code"):
            raise
        print(f"visiondistill {words[0]}: {error}", file=sys.stderr)
        return error.exit_code


def _foreign(words: list[str]) -> Callable[[list[str]], int] | None:
    """The command "verb topic" that another package adds, as its entry point "verb.topic"."""
    if len(words) < 2 or words[1].startswith("-"):
        return None
    found = entry_points(group=COMMANDS, name=f"{words[0]}.{words[1]}")
    return next(iter(found)).load() if found else None


def train(words: list[str]) -> int:
    """usage: visiondistill train --recipe NAME|FILE [--dry-run] [--dotted.key value ...]

    Runs a recipe. Every key of the recipe can be overridden: --run.output_dir runs/mine
    --run.seed 1 --stages.student.steps 2000. The resolved recipe is saved as config.yaml in the
    run folder; train --recipe that/file repeats the run, --run.resume auto continues it.
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
    config = recipes.override(recipes.load(changes.pop("recipe")), changes)
    from visiondistill.engine.across import process_index
    from visiondistill.workbench import run

    outcome = run(config, dry_run)
    if outcome is None:
        return 0
    result = outcome.result
    if process_index() == 0:
        print(f"{result.reason} after step {result.step}; run folder {result.output_dir}")
    return 0 if result.reason == "finished" else 128 + signal.Signals[result.reason]


def finetune(words: list[str]) -> int:
    """usage: visiondistill finetune [--dotted.key value ...]

    The same as train --recipe finetune: puts a new head on a pretrained timm model, for the
    classes of your folder (--student.name NAME --data.root DIR).
    """
    return 0 if asks_help(words, finetune) else train(["--recipe", "finetune", *words])


def evaluate(words: list[str]) -> int:
    """usage: visiondistill evaluate accuracy|cost --run DIR
              visiondistill evaluate accuracy|cost --model NAME|EXPORT [--data.root DIR] [--output_dir DIR]

    accuracy: top-1/5, NLL, calibration, agreement with the teacher, per-class table and plots on
    the test images. cost: parameters, operations, latency and throughput.
    """
    if asks_help(words, evaluate):
        return 0
    if words[:1] not in (["accuracy"], ["cost"]):
        print(help_of(evaluate), file=sys.stderr)
        return 2
    from rich.console import Console

    from visiondistill import recipes
    from visiondistill.eval import cost_table
    from visiondistill.measure import accuracy, cost

    changes = recipes.parse_overrides(words[1:])
    if words[0] == "cost":
        Console().print(cost_table(cost(changes)))
    else:
        report = accuracy(changes)
        Console().print(report.table(), report.class_table())
    return 0


def methods(words: list[str]) -> int:
    """usage: visiondistill methods [NAME]

    Lists the recipes that come with the package, or prints one of them with its bases merged in.
    """
    if asks_help(words, methods):
        return 0
    from visiondistill import recipes

    if words:
        config = recipes.load(words[0])
        print(recipes.about(words[0]), recipes.dump(config), sep="\n", end="")
        return 0
    for name in recipes.names():
        print(f"{name:<16} {recipes.about(name).splitlines()[0]}")
    return 0


def demo(words: list[str]) -> int:
    """usage: visiondistill demo [--output_dir DIR] [--seeds N]

    Trains a teacher on real handwritten digits, then a small student without and with it, and
    shows the difference: a table, and a plot in DIR (default runs/demo).
    """
    options = options_of(words, demo, {"output_dir": "runs/demo", "seeds": 3})
    if options is None:
        return 0
    from visiondistill.demo import run_demo

    run_demo(Path(options["output_dir"]), seeds=range(options["seeds"]))
    return 0


def benchmark(words: list[str]) -> int:
    """usage: visiondistill benchmark step [--pairs N]

    Times the engine's loop against a hand-written loop that does the same work, interleaved, and
    prints the ratios.
    """
    if words[:1] != ["step"]:
        print(help_of(benchmark))
        return 0 if asks_help(words, benchmark, show=False) else 2
    options = options_of(words[1:], benchmark, {"pairs": 60})
    if options is None:
        return 0
    from visiondistill.benchmark import benchmark_step

    benchmark_step(options["pairs"])
    return 0
