"""The recipes of generators, on a tiny teacher and tiny images, with everything that they say of the method kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_folders as folders
import pytest
import torch
from PIL import Image

from diffusion.generator import Generator
from diffusion.models import Pipeline
from diffusion.pairs import store_pairs
from visiondistill import recipes, workbench

MATCHING = {"student/dmd", "critic/denoising"}
TERMS = {
    "denoising": {"student/denoising"},
    "dmd": MATCHING | {"student/regression"},
    "dmd2": MATCHING | {"student/gan", "critic/gan"},
    "diff_instruct": MATCHING,
    "dmd2_lora": MATCHING,
}
SIZE, ROWS, STEPS = 8, 8, 6
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `teacher` and `texts` (by diffusers alone), `prompts.txt` and `pairs`."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    place = tmp_path_factory.mktemp("recipes")
    for number in range(30):
        split = ("train", "val", "test")[number % 3]
        file = place / "data" / split / f"class {number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIZE, SIZE, 3), 8 * number, np.uint8)).save(file)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(sample_size=SIZE, num_class_embeds=3, **SMALL, **blocks)
    DDPMPipeline(network, DDPMScheduler(clip_sample=False)).save_pretrained(place / "teacher")
    folders.stable_diffusion(place / "texts")
    (place / "prompts.txt").write_text("a red cat\na blue dog\n")
    store_pairs(Pipeline(str(place / "teacher"), num_classes=2), 24, place / "pairs", steps=3)
    return place


def shrunk(name: str, place: Path, output: Path) -> dict[str, Any]:
    config = recipes.load(name)
    changes = {"steps": STEPS, "run.output_dir": str(output), "run.device": "cpu", "run.progress": False}
    changes |= {"run.batch_size": ROWS, "run.log_every": 1, "run.proof_window": 2, "run.evaluate_every": None}
    if "data" in config:
        changes |= {"data.root": str(place / "data"), "data.size": SIZE}
    if "teacher" in config:
        texts = "prompts" in config["teacher"]["init_args"]
        changes |= {"teacher.folder": str(place / ("texts" if texts else "teacher"))}
        changes |= {"teacher.prompts": str(place / "prompts.txt")} if texts else {"teacher.num_classes": 2}
    if "UNet2D" in recipes.dump(config):
        changes |= {f"student.{key}": value for key, value in SMALL.items()}
    if "regression" in config["method"]["init_args"]:
        changes |= {"method.regression.pairs": str(place / "pairs"), "method.regression.batch_size": ROWS}
    return recipes.override(config, changes)


def test_every_recipe_of_a_generator_is_tried_here():
    measured = "measured/"  # those run in `test_one_step` and `test_diffusion_demo`
    ours = {name for name in recipes.names() if "diffusion.methods" in recipes.dump(recipes.load(name))}
    assert {name for name in ours if not name.startswith(measured)} == set(TERMS)


@pytest.mark.parametrize("name", TERMS)
def test_a_recipe_trains_and_leaves_a_pipeline(name: str, place: Path, tmp_path: Path):
    config = shrunk(name, place, tmp_path)
    outcome = workbench.run(config)
    result = outcome.result
    assert (result.reason, result.step) == ("finished", STEPS)
    values = {key: value for line in result.history for key, value in line.items()}
    assert all(map(math.isfinite, (value for key, value in values.items() if "/" in key)))
    assert {key for key in values if key.startswith(("student/", "critic/"))} == TERMS[name]
    assert isinstance(result.ema, Generator)
    images, labels = next(result.ema.images(4, steps=2))
    assert images.shape == (4, *result.ema.input_size)
    said = config["teacher"]["init_args"] if "teacher" in config else {"num_classes": 2}
    assert (labels is None) == ("prompts" in said)
    assert labels is None or labels.tolist() == [0, 1, 0, 1]
    opened = Pipeline(**said | {"folder": str(outcome.exported.folder)})
    again, _ = next(opened.images(4, steps=2))
    torch.testing.assert_close(again, images, rtol=0, atol=1e-5)
    taught = f"Pipeline of {config['teacher']['init_args']['folder']}" if "teacher" in config else "not stated"
    assert f"- teacher: {taught}\n" in (outcome.exported.folder / "README.md").read_text()


def test_images_without_captions_are_refused_before_a_run_that_reads_them(place: Path, tmp_path: Path):
    texts = {"teacher.folder": str(place / "texts"), "teacher.prompts": str(place / "prompts.txt"), "data.size": 16}
    config = shrunk("dmd2", place, tmp_path)
    del config["teacher"]["init_args"]["num_classes"]
    with pytest.raises(recipes.RecipeError, match=r'method: .*no column "prompt".*store latents --captions FILE'):
        recipes.plan(recipes.override(config, texts))
