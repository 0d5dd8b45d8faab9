"""What a stranger's process does: open an export with timm, or with torch alone, and answer images.

    python opened.py timm|program FOLDER IMAGES.npz OUT.npz

IMAGES holds uint8 `image` `[N, H, W]` or `[N, H, W, 3]` and `label`, and float32 `prepared` `[M, C, H, W]`: what
the classifier itself takes. OUT gets the logits of both, and the number of labels that were met.
"""

import sys

sys.modules["visiondistill"] = None  # any import of it fails from here on

import numpy as np  # noqa: E402
import torch  # noqa: E402


def with_timm(folder):
    """The documented two lines, and timm's own transform of PIL images."""
    import timm
    from PIL import Image

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    return model, lambda arrays: torch.stack([transform(Image.fromarray(array)) for array in arrays])


def with_torch(folder):
    sys.modules["timm"] = sys.modules["torchvision"] = None
    model = torch.export.load(f"{folder}/model.pt2").module()
    return model, lambda arrays: torch.from_numpy(arrays.reshape(*arrays.shape[:3], -1)).permute(0, 3, 1, 2) / 255


kind, folder, images, out = sys.argv[1:]
given = np.load(images)
model, transform = (with_timm if kind == "timm" else with_torch)(folder)
with torch.no_grad():
    prepared = model(torch.from_numpy(given["prepared"]))
    logits = model(transform(given["image"]))
right = (logits.argmax(1) == torch.from_numpy(given["label"])).sum()
np.savez(out, prepared=prepared.numpy(), logits=logits.numpy(), right=right.numpy())
assert not any(name.split(".")[0] == "visiondistill" and module for name, module in sys.modules.items())
