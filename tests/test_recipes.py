"""Recipes: what is refused, and how; what is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from visiondistill import recipes
from visiondistill.recipes import RecipeError

RECIPES = sorted(str(p.relative_to(recipes.folder()).with_suffix("")) for p in recipes.folder().rglob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_the_signatures(name: str) -> None:
    recipes.check(yaml.safe_load(recipes.dump(recipes.load(name))))
    assert recipes.about(name) != name, "the comment on top says what the recipe is"


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("smoke/")])
def test_recipes_without_files_build(name: str) -> None:
    config = recipes.load(name)
    stages, run = recipes.build(config)
    assert [stage.name for stage in stages] == list(config["stages"])
    assert run.batch_size == config["run"]["batch_size"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage": {}}, "stage"),
        ({"stages.student.step": 3}, "step"),
        ({"stages.student.steps": "many"}, "steps"),
        ({"stages.student.optim.student.lrr": 0.1}, "lrr"),
        ({"stages.student.optim.student.lr": -1}, "lr"),
        ({"stages.student.method.class_path": "visiondistill.Destiller"}, "Destiller"),
        ({"stages.student.method.init_args.termz": {}}, "termz"),
        ({"run.bach_size": 3}, "bach_size"),
        ({"run.seed.x": 3}, "run.seed"),
        ({"run.batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_keys_and_values_are_named(changes: dict, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        recipes.build(recipes.override(recipes.load("smoke/kd"), changes))


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="smoke/kd"):
        recipes.load("smoke/kdd")


@pytest.mark.parametrize(
    ("text", "message"), [("run: {a: 1, a: 2}", "given twice"), ("run: [", "not readable"), ("- 1", "mapping")]
)
def test_unreadable_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(path)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 2e-4\nb: 1.5E3\nc: -3\nd: 1e5x\ne: .5e1")
    assert recipes.load(path) == {"a": 2e-4, "b": 1.5e3, "c": -3, "d": "1e5x", "e": 5.0}


def test_overrides_are_typed_and_leave_the_original_alone() -> None:
    config = {"run": {"seed": 0}}
    changed = recipes.override(config, recipes.parse_overrides(["--run.seed", "3", "--run.compile=true"]))
    assert changed == {"run": {"seed": 3, "compile": True}}
    assert config == {"run": {"seed": 0}}
    for words in (["run.seed"], ["--run.seed"]):
        with pytest.raises(RecipeError, match=r"run\.seed"):
            recipes.parse_overrides(words)
