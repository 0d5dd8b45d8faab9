"""Losses as pure functions of tensors.

Logits are `[B, K]`, targets `[B]` int64. All work in log space, lift half precision to float32,
stay finite for logits of +-1e4 and are differentiable in every floating argument: whoever holds a
teacher decides about its gradient. `reduction="none"` gives one value per row.
"""

from visiondistill.losses.attention import attention_transfer_loss
from visiondistill.losses.balanced import balanced_divergence_loss
from visiondistill.losses.binary_kl import binary_kl_loss, binary_kl_norm_loss
from visiondistill.losses.crd import crd_loss
from visiondistill.losses.dist import dist_loss
from visiondistill.losses.dkd import dkd_loss
from visiondistill.losses.hint import hint_loss
from visiondistill.losses.kd import kd_loss, reverse_kd_loss
from visiondistill.losses.nd import nd_loss
from visiondistill.losses.ofa import ofa_loss
from visiondistill.losses.pld import pld_loss
from visiondistill.losses.reviewkd import hierarchical_context_loss
from visiondistill.losses.rkd import rkd_loss
from visiondistill.losses.sinkhorn import sinkhorn_loss
from visiondistill.losses.standardize import standardize_logits
from visiondistill.losses.taid import taid_loss

__all__ = [
    "attention_transfer_loss",
    "balanced_divergence_loss",
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "crd_loss",
    "dist_loss",
    "dkd_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "kd_loss",
    "nd_loss",
    "ofa_loss",
    "pld_loss",
    "reverse_kd_loss",
    "rkd_loss",
    "sinkhorn_loss",
    "standardize_logits",
    "taid_loss",
]
