"""Where targets come from."""

from visiondistill.teachers.base import Teacher
from visiondistill.teachers.ensemble import Ensemble
from visiondistill.teachers.live import LiveTeacher, as_teacher
from visiondistill.teachers.online import Online
from visiondistill.teachers.stored import Stored, store_targets

__all__ = ["Ensemble", "LiveTeacher", "Online", "Stored", "Teacher", "as_teacher", "store_targets"]
