"""Data as functions of (seed, step): sources, sets in memory or behind workers, and the stream that cuts batches."""

from visiondistill.data.digits import Digits
from visiondistill.data.folder import ImageFolder
from visiondistill.data.glyphs import Glyphs
from visiondistill.data.order import EpochOrder
from visiondistill.data.own import EmbeddedDigits, OwnData, split_of
from visiondistill.data.parquet import Parquet
from visiondistill.data.pruned import Pruned
from visiondistill.data.source import Account, Source, Split
from visiondistill.data.stream import Stream, in_order
from visiondistill.data.tensors import TensorData
from visiondistill.data.timm_sets import TimmData
from visiondistill.data.torchvision_sets import Torchvision

__all__ = [
    "Account",
    "Digits",
    "EmbeddedDigits",
    "EpochOrder",
    "Glyphs",
    "ImageFolder",
    "OwnData",
    "Parquet",
    "Pruned",
    "Source",
    "Split",
    "Stream",
    "TensorData",
    "TimmData",
    "Torchvision",
    "in_order",
    "split_of",
]
