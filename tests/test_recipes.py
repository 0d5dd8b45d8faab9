"""Recipes: what is refused, and how; what is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from visiondistill import recipes
from visiondistill.compare import load as load_comparison
from visiondistill.compare import names as comparisons
from visiondistill.recipes import RecipeError

RECIPES = recipes.names()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_the_signatures(name: str) -> None:
    recipes.check(yaml.safe_load(recipes.dump(recipes.load(name))))
    assert recipes.about(name) != name, "the comment on top says what the recipe is"


@pytest.mark.parametrize("name", comparisons())
def test_every_comparison_fits(name: str) -> None:
    """Its arms are checked when it is loaded."""
    assert load_comparison(name).reference


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


@pytest.mark.parametrize("name", ["data.source.root", "data.source"])
def test_arguments_without_their_class_are_refused_with_the_keys_that_name_it(name: str) -> None:
    value = "photos" if name.endswith("root") else {"root": "photos"}
    config = {"data": {"class_path": "diffusion.models.CachedLatents", "init_args": {"file": "latents"}}}
    told = r"data\.source: .*which Source it is: .*class_path: .*init_args: \{root: \.\.\.\}"
    with pytest.raises(RecipeError, match=told):
        recipes.source_of(recipes.override(config, {name: value}))


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


def test_a_base_is_merged_deeply(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "a: {x: 1, y: 2}\nnode: {class_path: p.A, init_args: {one: 1}}\nother: {class_path: p.A, init_args: {one: 1}}"
    )
    (tmp_path / "own.yaml").write_text(
        f"base: {tmp_path / 'base.yaml'}\n"
        "a: {y: null, z: 3}\nnode: {init_args: {two: 2}}\nother: {class_path: p.B, init_args: {two: 2}}"
    )
    assert recipes.load(tmp_path / "own.yaml") == {
        "a": {"x": 1, "z": 3},
        "node": {"class_path": "p.A", "init_args": {"one": 1, "two": 2}},
        "other": {"class_path": "p.B", "init_args": {"two": 2}},
    }


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path / 'b.yaml'}")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path / 'a.yaml'}")
    with pytest.raises(RecipeError, match="back to itself"):
        recipes.load(tmp_path / "a.yaml")


def test_derived_recipes_hold_their_own_terms_alone() -> None:
    terms = {name: recipes.load(name)["method"]["init_args"]["terms"] for name in ("kd", "dkd", "dist", "lskd")}
    assert {name: sorted(entries) for name, entries in terms.items()} == {
        "kd": ["ce", "kd"],
        "dkd": ["ce", "dkd"],
        "dist": ["ce", "dist"],
        "lskd": ["ce", "kd"],
    }
    assert recipes.load("dkd")["method"]["init_args"]["weighting"]["init_args"]["weights"].keys() == {"ce", "dkd"}


def test_a_class_argument_needs_no_init_args_in_a_dotted_key() -> None:
    config = recipes.override(recipes.load("kd"), {"student.name": "resnet34", "method.terms.kd.temperature": 2.0})
    assert config["student"]["init_args"]["name"] == "resnet34"
    assert config["method"]["init_args"]["terms"]["kd"]["init_args"]["temperature"] == 2.0
    swapped = recipes.override(config, {"student.class_path": "visiondistill.models.SmallMLP"})
    assert "init_args" not in swapped["student"], "arguments of another class do not carry over"


WRONG = """
--method.terms.kd.temprature 2|method.terms.kd.temprature
--method.terms.kd.temperature hot|method.terms.kd.temperature
--method.terms.kd.class_path visiondistill.terms.KLL|method.terms.kd.class_path
--method.terms.kd.class_path nowhere.KL|method.terms.kd.class_path
--method.terms.kd.class_path KL|method.terms.kd.class_path
--method.terms.kd.class_path torch.nn.Linear|method.terms.kd.class_path
--method.terms.kd 3|method.terms.kd
--method.weighting.weights.ce heavy|method.weighting.weights.ce
--method.weighting.weight.ce 1|method.weighting.weight
--method.class_path visiondistill.Destiller|method.class_path
--method 3|method
--student.nam resnet18|student.nam
--student.pretrained maybe|student.pretrained
--student.class_path visiondistill.models.Tim|student.class_path
--student resnet18|student
--teacher.nmae resnet50|teacher.nmae
--teacher.input_size big|teacher.input_size
--data.rot photos|data.rot
--data.class_path visiondistill.data.Folder|data.class_path
--data.val_fraction half|data.val_fraction
--steps many|steps
--steps 0|steps
--steps 1.5|steps
--optim.student.lrr 1|optim.student.lrr
--optim.student.lr fast|optim.student.lr
--optim.student.lr .inf|optim.student.lr
--optim.student.schedule cosin|optim.student
--optim.student.warmup -1|optim.student
--run.batchsize 3|run.batchsize
--run.batch_size 0|run
--run.mixed_precision half|run.mixed_precision
--run.grad_accum_steps 3|run
--run.ema_decay 2|run
--runn.seed 1|runn
--workers some|workers
--stages.a.steps 3|stages
""".strip()

MANY = """
import contextlib, io, sys
import subprocess
import sys
from pathlib import Path
from visiondistill.cli import main
for line in sys.stdin.read().splitlines():
    words, key = line.split("|")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", "--recipe", "kd", "--run.output_dir", "out", *words.split()])
    assert code == 2, (line, code)
    assert key in said.getvalue(), (line, said.getvalue())
assert not list(Path(".").iterdir()), list(Path(".").iterdir())
assert "timm" not in sys.modules
"""


def test_wrong_configs_end_with_2_name_the_key_and_create_nothing(tmp_path: Path) -> None:
    assert len(WRONG.splitlines()) >= 30
    done = subprocess.run([sys.executable, "-c", MANY], input=WRONG, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
