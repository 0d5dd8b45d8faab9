"""What images are distilled on."""

from visiondistill.augmentors.augment import Augment
from visiondistill.augmentors.chain import Chain
from visiondistill.augmentors.mix import Mix

__all__ = ["Augment", "Chain", "Mix"]
