"""Guidance that a pipeline of diffusers can say is exported, other guidance is refused with the cure."""

from __future__ import annotations

from pathlib import Path

import pipeline_folders as folders
import pytest

from diffusion.export import NotExportable, export_generator
from diffusion.export.bundle import why_not
from diffusion.models import UNet2D, open_generator, vp


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na red dog\n")
    return str(file)


def test_a_rescaled_text_teacher_says_so_and_samples_so(tmp_path: Path, prompts: str):
    how = {"guidance_scale": 3.0, "guidance_rescale": 0.7, "steps": 3}
    teacher = open_generator(folders.stable_diffusion(tmp_path / "sd"), prompts=prompts, **how)
    exported = export_generator(teacher, tmp_path / "export")  # it compares the images
    assert exported.call == {"guidance_scale": 3.0, "guidance_rescale": 0.7}
    assert "give `guidance_scale=3, guidance_rescale=0.7`" in (exported.folder / "README.md").read_text()


def test_guidance_that_no_pipeline_can_say_is_refused_with_the_cure(tmp_path: Path, prompts: str):
    text = folders.stable_diffusion(tmp_path / "sd"), {"prompts": prompts}
    dit = folders.dit(tmp_path / "dit"), {}
    pixels = {"process": vp(), "block_out_channels": (8, 16), "norm_num_groups": 4, "guidance_scale": 2.0}
    for (folder, options), told in ((text, "UNet2DConditionModel"), (dit, "DiTTransformer2DModel")):
        within = open_generator(folder, **options, guidance_scale=2.0, guidance_interval=(100, 700))
        assert f"no pipeline of {told} guides in an interval: export with guidance_interval=None, not " in why_not(
            within
        )
        unguided = open_generator(folder, **options, guidance_interval=(100, 700), guidance_rescale=0.5)
        assert why_not(unguided) is None, "at scale 1 they do nothing"
        assert why_not(within.student(within.denoiser, 4)) is None
    rescaled = open_generator(dit[0], guidance_scale=2.0, guidance_rescale=0.5)
    assert "no pipeline of DiTTransformer2DModel rescales guidance: export with guidance_rescale=0" in why_not(rescaled)
    guided = UNet2D((3, 8, 8), 3, **pixels, guidance_rescale=0.5)
    assert "UNet2DModel" in why_not(guided)
    with pytest.raises(NotExportable) as refused:
        export_generator(guided, tmp_path / "export")
    assert str(refused.value) == why_not(guided)
    assert not (tmp_path / "export").exists()
