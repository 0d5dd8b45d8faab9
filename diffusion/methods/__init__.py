"""Training methods of diffusion distillation, each on the engine of `visiondistill`."""

from diffusion.methods.base import GeneratorMethod
from diffusion.methods.denoising import Denoising
from diffusion.methods.dmd2 import DMD2, Regression

__all__ = ["DMD2", "Denoising", "GeneratorMethod", "Regression"]
