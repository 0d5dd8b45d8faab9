"""How supervision signals are fused."""

from visiondistill.weighting.aligned import Aligned
from visiondistill.weighting.base import Weighting
from visiondistill.weighting.by_fraction import ByFraction
from visiondistill.weighting.fixed import Fixed, Ramp
from visiondistill.weighting.trilateral import Trilateral

__all__ = ["Aligned", "ByFraction", "Fixed", "Ramp", "Trilateral", "Weighting"]
