"""Where targets come from."""

from visiondistill.teachers.base import Teacher
from visiondistill.teachers.ensemble import Ensemble
from visiondistill.teachers.live import LiveTeacher, as_teacher

__all__ = ["Ensemble", "LiveTeacher", "Teacher", "as_teacher"]
