"""A method of the user's own, in a package outside this repository, from a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = '''
import torch
from torch import nn
from visiondistill import Method, Optim, Run, Stage, train
from visiondistill.data import Stream, TensorData
from visiondistill.engine import Turn


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x):
        return self.up(self.down(x).tanh())


class Denoise(Method):
    """An autoencoder, and a critic in a turn of its own that learns what the autoencoder gets wrong."""

    def __init__(self, data):
        super().__init__({"net": Autoencoder(), "critic": nn.Linear(6, 1)}, streams={"train": Stream(data, 16)})

    def turns(self):
        return (Turn("net", self.net, moves=("net",)), Turn("critic", self.critic, moves=("critic",), every=2))

    def prepare(self, batch, draw, due):
        batch["noise"] = 0.1 * draw.normal("noise", 6)
        return batch

    def net(self, batch):
        x = batch["train"]["x"]
        error = (self.players["net"](x + batch["noise"]) - x).square().mean(1)
        return {"mse": error.mean()}, {"error": error}

    def critic(self, batch):
        x = batch["train"]["x"]
        with torch.no_grad():
            error = (self.players["net"](x + batch["noise"]) - x).square().mean(1)
        return {"fit": (self.players["critic"](x)[:, 0] - error).square().mean()}, {}


if __name__ == "__main__":
    import sys
    torch.manual_seed(0)
    data = TensorData({"x": torch.randn(64, 6) @ torch.randn(6, 6)})
    optim = {"default": Optim(lr=1e-2), "critic": Optim(name="sgd", lr=1e-2)}
    result = train([Stage(Denoise(data), 200, optim)], Run(sys.argv[1], batch_size=16, progress=False, ema_decay=0.9))
    first, last = result.history[0]["net/mse"], result.history[-1]["net/mse"]
    assert last < first / 2, (first, last)
    assert result.proofs["main"].reached == {"net/mse": ["net"], "critic/fit": ["critic"]}
'''


def test_a_foreign_method_with_two_turns_trains(tmp_path: Path) -> None:
    (tmp_path / "denoise.py").write_text(PACKAGE)
    command = [sys.executable, str(tmp_path / "denoise.py"), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
