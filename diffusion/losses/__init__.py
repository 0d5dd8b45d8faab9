"""Loss functions of diffusion distillation: pure, torch only; see each for its equation."""

from diffusion.losses.adversarial import gan_discriminator_loss, gan_generator_loss, gradient_penalty
from diffusion.losses.denoising import denoising_loss, edm_loss_weight
from diffusion.losses.distribution_matching import dmd_loss, sid_loss
from diffusion.losses.divergence import density_ratio, fdistill_weight, update_bin_means
from diffusion.losses.regression import regression_loss

__all__ = [
    "denoising_loss",
    "density_ratio",
    "dmd_loss",
    "edm_loss_weight",
    "fdistill_weight",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "gradient_penalty",
    "regression_loss",
    "sid_loss",
    "update_bin_means",
]
