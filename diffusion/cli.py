"""The commands that `diffusion` adds to the console command."""

from __future__ import annotations

from pathlib import Path

from visiondistill.options import options_of


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
