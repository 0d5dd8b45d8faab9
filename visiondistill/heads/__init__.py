"""How many classifiers share the student's trunk."""

from visiondistill.heads.base import Heads
from visiondistill.heads.dual import DualHead
from visiondistill.heads.single import SingleHead

__all__ = ["DualHead", "Heads", "SingleHead"]
