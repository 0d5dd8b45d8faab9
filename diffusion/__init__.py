"""Diffusion distillation: noise paths, denoisers, samplers, losses and methods on `visiondistill.engine`.

Importing this package loads nothing else; import the part that you need, such as `diffusion.process`.
"""
