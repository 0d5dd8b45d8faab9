"""Losses as pure functions of tensors.

Logits are `[B, K]`, targets `[B]` int64. All work in log space, lift half precision to float32,
stay finite for logits of +-1e4 and are differentiable in every floating argument: whoever holds a
teacher decides about its gradient. `reduction="none"` gives one value per row.
"""

from visiondistill.losses.dist import dist_loss
from visiondistill.losses.dkd import dkd_loss
from visiondistill.losses.hint import hint_loss
from visiondistill.losses.kd import kd_loss, reverse_kd_loss
from visiondistill.losses.standardize import standardize_logits

__all__ = ["dist_loss", "dkd_loss", "hint_loss", "kd_loss", "reverse_kd_loss", "standardize_logits"]
