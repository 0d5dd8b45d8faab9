"""Where targets come from."""

from visiondistill.teachers.base import Teacher
from visiondistill.teachers.ensemble import Ensemble
from visiondistill.teachers.live import LiveTeacher, as_teacher
from visiondistill.teachers.online import Online

__all__ = ["Ensemble", "LiveTeacher", "Online", "Teacher", "as_teacher"]
