"""How supervision signals are fused."""

from visiondistill.weighting.base import Weighting
from visiondistill.weighting.fixed import Fixed, Ramp

__all__ = ["Fixed", "Ramp", "Weighting"]
