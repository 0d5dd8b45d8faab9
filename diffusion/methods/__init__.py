"""Distillation methods on `visiondistill.engine`, one published method per file."""
