"""Generators as pipeline folders of diffusers, which open without this package."""

from diffusion.export.bundle import (
    TOLERANCE,
    About,
    ExportedPipeline,
    NotExportable,
    export_generator,
    export_lora,
    why_not,
)

__all__ = ["TOLERANCE", "About", "ExportedPipeline", "NotExportable", "export_generator", "export_lora", "why_not"]
