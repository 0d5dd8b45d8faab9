"""One training loop for every method: see `method.py` for the contract and `loop.py` for the flow."""

from visiondistill.engine.across import gather_across, mean_across
from visiondistill.engine.loop import Result, Watch, train
from visiondistill.engine.method import Batch, Carry, Frozen, Method, Stream, Terms, Turn
from visiondistill.engine.rng import Draw
from visiondistill.engine.settings import Optim, Run, Stage

__all__ = [
    "Batch",
    "Carry",
    "Draw",
    "Frozen",
    "Method",
    "Optim",
    "Result",
    "Run",
    "Stage",
    "Stream",
    "Terms",
    "Turn",
    "Watch",
    "gather_across",
    "mean_across",
    "train",
]
