"""How supervision signals are fused."""

from visiondistill.weighting.aligned import Aligned
from visiondistill.weighting.base import Weighting
from visiondistill.weighting.fixed import Fixed, Ramp
from visiondistill.weighting.trilateral import Trilateral

__all__ = ["Aligned", "Fixed", "Ramp", "Trilateral", "Weighting"]
