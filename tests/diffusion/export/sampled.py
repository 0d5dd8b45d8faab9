"""What a stranger's process does: open exports with diffusers alone and sample, without a word about schedulers.

    python sampled.py CALLS.json OUT.safetensors

CALLS: a list of {"folder", "call", "generator"}; OUT gets each one's images under its number.
"""

import json
import sys
from pathlib import Path

sys.modules["visiondistill"] = sys.modules["diffusion"] = None  # any import of them fails from here on

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

found = {}
for number, asked in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    pipeline = DiffusionPipeline.from_pretrained(asked["folder"])
    torch.manual_seed(5)
    seed = {"generator": torch.Generator().manual_seed(5)} if asked["generator"] else {}
    images = pipeline(**asked["call"], **seed, output_type="np").images
    found[str(number)] = torch.as_tensor(images if isinstance(images, torch.Tensor) else images.copy())
save_file(found, sys.argv[2])
