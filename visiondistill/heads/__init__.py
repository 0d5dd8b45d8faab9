"""How many classifiers share the student's trunk."""

from visiondistill.heads.base import Heads
from visiondistill.heads.distilled import DistilledHead
from visiondistill.heads.dual import DualHead
from visiondistill.heads.single import SingleHead

__all__ = ["DistilledHead", "DualHead", "Heads", "SingleHead"]
