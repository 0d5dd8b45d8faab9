"""Noise paths `x_t = alpha(t) * x0 + sigma(t) * noise`, conversions along them, and laws of time."""

from diffusion.process.base import KINDS, Noised, Process
from diffusion.process.discrete import VPProcess
from diffusion.process.paths import ContinuousVPProcess, EDMProcess, FlowProcess, TrigProcess
from diffusion.process.times import TimeLaw, block_times, karras_sigmas, shift_time, time_quantile

__all__ = [
    "KINDS",
    "ContinuousVPProcess",
    "EDMProcess",
    "FlowProcess",
    "Noised",
    "Process",
    "TimeLaw",
    "TrigProcess",
    "VPProcess",
    "block_times",
    "karras_sigmas",
    "shift_time",
    "time_quantile",
]
