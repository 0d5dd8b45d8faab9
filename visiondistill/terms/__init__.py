"""What is matched: one published idea per file."""

from visiondistill.terms.base import Needs, Term, View
from visiondistill.terms.ce import CE
from visiondistill.terms.dist import DIST
from visiondistill.terms.dkd import DKD
from visiondistill.terms.hint import Hint
from visiondistill.terms.kl import KL
from visiondistill.terms.peer import Peer

__all__ = ["CE", "DIST", "DKD", "KL", "Hint", "Needs", "Peer", "Term", "View"]
