"""What is matched: one published idea per file."""

from visiondistill.terms.base import Needs, Term, View
from visiondistill.terms.ce import CE
from visiondistill.terms.hint import Hint
from visiondistill.terms.kl import KL

__all__ = ["CE", "KL", "Hint", "Needs", "Term", "View"]
