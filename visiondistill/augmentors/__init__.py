"""What images are distilled on."""

from visiondistill.augmentors.augment import Augment
from visiondistill.augmentors.chain import Chain
from visiondistill.augmentors.edits import Affine, AffineRange, Edit, Mask
from visiondistill.augmentors.hard import Hard
from visiondistill.augmentors.latent import LatentEdit
from visiondistill.augmentors.mix import Mix
from visiondistill.augmentors.pictures import draw_edits

__all__ = ["Affine", "AffineRange", "Augment", "Chain", "Edit", "Hard", "LatentEdit", "Mask", "Mix", "draw_edits"]
