"""What learned augmentations transfer: shifted signs, of which the student has only seen centred ones.

    python -m visiondistill.mechanisms.hard --seeds 3 --output runs/hard

One teacher (seed 0), the recipes `measured/hard_*` as arms, paired seeds. For each run: accuracy on
centred and on shifted images, and which shifts the edits made, as coverage of the 13 x 13 places to
which test images are shifted: at each look, at the end, and over the whole run. Finished runs are not
done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill import recipes
from visiondistill.augmentors import AffineRange, Hard
from visiondistill.data.glyphs import CANVAS, MARGIN, glyphs
from visiondistill.engine import Result, train
from visiondistill.engine.rng import Draw, key
from visiondistill.engine.state import write_text
from visiondistill.eval import evaluate
from visiondistill.mechanisms.tables import finished, markdown, spread

ARMS = ("none", "shift", "half", "affine", "range", "switch", "all", "whole")
"""No shifts; random ones of every image, and of every second one on average; learned ones of every second image;
learned ones of every image, wide from the start, between pixels and by whole ones."""
SIDE = 2 * MARGIN + 1
ENOUGH = 0.1
"""A place is covered that gets this share of what uniform shifts would give it."""


class WholePixels(AffineRange):
    """Moves signs by whole pixels, as the test images are: nothing is interpolated, which would blur them.

    The gradient passes the rounding as if it were not there.
    """

    def numbers(self, code: Tensor, noise: Tensor, partner: Tensor) -> Tensor:
        numbers = super().numbers(code, noise, partner)
        pixels, (turn, shift, rest) = self.moves.bounds[1:3] * CANVAS, numbers.split([1, 2, 3], dim=1)
        return torch.cat([turn, shift + ((shift * pixels).round() / pixels - shift).detach(), rest], 1)


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=Path("runs/hard"))
    given = parser.parse_args()
    teacher = taught(given.output)
    print(f"teacher: {_accuracies(teacher)}", flush=True)
    for seed in range(given.seeds):
        for arm in given.arms:
            print(f"{arm}, seed {seed}: {measured(arm, seed, teacher, given.output)}", flush=True)
    print(table(given.output, given.arms, given.seeds))
    print(f"covered, by step\n{curves(given.output, given.arms, given.seeds)}")


def taught(folder: Path) -> nn.Module:
    """The teacher that the recipes' first stage trains, from its file if it is there.

    Raises:
        KeyboardInterrupt: a signal ended its training.
    """
    plan = _stage("none", "teacher", {"output_dir": str(folder / "teacher"), "seed": 0}, {})
    file = folder / "teacher.pt"
    if not file.is_file():
        _finished(train(plan.stages, plan.run))
        torch.save(plan.stages[0].method.product().state_dict(), file)
    network = plan.stages[0].method.product()
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()


def measured(arm: str, seed: int, teacher: nn.Module, folder: Path) -> dict[str, Any]:
    """One run: its accuracies and its coverage (by step: "covered"), kept in `result.json`.

    Raises:
        KeyboardInterrupt: a signal ended it. Its looks at the edits are lost, so that it cannot go on.
    """
    place = folder / f"{arm}_{seed}"
    file = place / "result.json"
    if file.is_file():
        return json.loads(file.read_text("utf-8"))
    plan = _stage(arm, "student", {"output_dir": str(place), "seed": seed}, {"teacher": teacher})
    method = plan.stages[0].method
    augmentor = getattr(method.parts, "augmentor", None)
    edit = augmentor.edit if isinstance(augmentor, Hard) else None
    looks: dict[int, Tensor] = {}

    def watch(product: nn.Module, step: int) -> Mapping[str, float]:
        if edit is not None:
            looks[step] = places(edit, len(looks))
        return {}

    result = _finished(train(plan.stages, plan.run, watch=watch))
    found = _accuracies(result.product.eval())
    if edit is not None:
        curve = {str(step): covered(counts) for step, counts in looks.items()}
        in_all = covered(torch.stack(list(looks.values())).sum(0))
        found |= {"covered": curve, "covered_at_end": list(curve.values())[-1], "covered_in_all": in_all}
        augmentor.draw(glyphs(10, seed=key("picture")).columns["image"], place)
    write_text(file, json.dumps(found))
    return found


def places(edit: nn.Module, look: int, count: int = 2000) -> Tensor:
    """How many of `count` images the edit moves to each place, `[13, 13]`, down and right."""
    image = glyphs(count, seed=key("places")).columns["image"]
    noise = edit.noise(image, Draw(0, look, {"": (0, count)}, count, image.device), "places")
    with torch.no_grad():
        shift = edit.numbers(image, noise, image)[:, 1:3] * edit.moves.bounds[1:3] * CANVAS
    cells = shift.round().long().clamp(-MARGIN, MARGIN) + MARGIN
    return (cells[:, 1] * SIDE + cells[:, 0]).bincount(minlength=SIDE**2).view(SIDE, SIDE)


def covered(counts: Tensor) -> float:
    """Share of the places that get `ENOUGH`."""
    return (counts >= ENOUGH * counts.sum() / counts.numel()).double().mean().item()


def table(folder: Path, arms: list[str], seeds: int) -> str:
    """Mean and standard deviation over seeds, in percent, as Markdown."""
    names = ("centred", "shifted", "covered_at_end", "covered_in_all")
    runs = {arm: finished(folder, arm, range(seeds)) for arm in arms}
    rows = [[arm, *(spread(found, name, 100, digits=1) for name in names)] for arm, found in runs.items()]
    return markdown(["arm", *(name.replace("_", " ") for name in names)], rows)


def curves(folder: Path, arms: list[str], seeds: int) -> str:
    """Mean coverage at each look, in percent, as Markdown: a row for each arm that makes edits."""
    looks = {}
    for arm in arms:
        runs = finished(folder, arm, range(seeds)).items()
        looks[arm] = {seed: found["covered"] for seed, found in runs if "covered" in found}
    steps = sorted({step for runs in looks.values() for curve in runs.values() for step in curve}, key=int)
    rows = [[arm, *(spread(runs, step, 100, digits=1) for step in steps)] for arm, runs in looks.items() if runs]
    return markdown(["arm", *steps], rows)


def _finished(result: Result) -> Result:
    if result.reason != "finished":
        raise KeyboardInterrupt(f"{result.reason} in {result.output_dir}: remove the folder to do the run again")
    return result


def _stage(arm: str, stage: str, run: dict[str, Any], given: dict[str, Any]) -> recipes.Plan:
    """One stage of an arm's recipe, on its own."""
    config = recipes.load(f"measured/hard_{arm}")
    config |= config.pop("stages")[stage]
    config["run"] |= run | {"progress": False, "device": "cpu"}
    return recipes.plan(config, given)


def _accuracies(network: nn.Module) -> dict[str, float]:
    shifts = {"centred": 0, "shifted": MARGIN}
    return {
        name: evaluate(network, glyphs(2000, shift, key("glyphs", "test", 0))).accuracy
        for name, shift in shifts.items()
    }


if __name__ == "__main__":
    main()
