"""What is matched: one published idea per file."""

from visiondistill.terms.attention import AttentionTransfer
from visiondistill.terms.balanced import BalancedDivergence
from visiondistill.terms.base import Needs, Term, View
from visiondistill.terms.binary_kl import BinaryKL
from visiondistill.terms.ce import CE
from visiondistill.terms.crd import CRD
from visiondistill.terms.dist import DIST
from visiondistill.terms.dkd import DKD
from visiondistill.terms.hint import Hint
from visiondistill.terms.kl import KL
from visiondistill.terms.nd import NormDirection
from visiondistill.terms.ofa import OFA
from visiondistill.terms.peer import Peer
from visiondistill.terms.pld import PLD
from visiondistill.terms.review import ReviewKD
from visiondistill.terms.rkd import RKD
from visiondistill.terms.sinkhorn import Sinkhorn
from visiondistill.terms.taid import TAID

__all__ = [
    "CE",
    "CRD",
    "DIST",
    "DKD",
    "KL",
    "OFA",
    "PLD",
    "RKD",
    "TAID",
    "AttentionTransfer",
    "BalancedDivergence",
    "BinaryKL",
    "Hint",
    "Needs",
    "NormDirection",
    "Peer",
    "ReviewKD",
    "Sinkhorn",
    "Term",
    "View",
]
