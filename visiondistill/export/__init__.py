"""Results that open without this package."""

from visiondistill.export.bundle import About, Exported, export, export_run, rehearse
from visiondistill.export.onnx_file import onnx_variants
from visiondistill.export.reopen import open_export

__all__ = ["About", "Exported", "export", "export_run", "onnx_variants", "open_export", "rehearse"]
