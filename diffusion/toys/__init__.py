"""A two-dimensional distribution whose scores are known exactly: the smallest honest experiment."""

from diffusion.toys.experiment import RingDMD2, RingRegression, report_ring, run_ring, sample_student, sample_teacher
from diffusion.toys.metrics import energy_distance, ring_metrics
from diffusion.toys.mixture import GaussianMixture, exact_denoiser, ring
from diffusion.toys.network import MLP, toy_denoiser
from diffusion.toys.picture import draw_ring

__all__ = [
    "MLP",
    "GaussianMixture",
    "RingDMD2",
    "RingRegression",
    "draw_ring",
    "energy_distance",
    "exact_denoiser",
    "report_ring",
    "ring",
    "ring_metrics",
    "run_ring",
    "sample_student",
    "sample_teacher",
    "toy_denoiser",
]
