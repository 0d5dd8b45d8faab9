"""Noise paths in continuous time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.process.base import Process, at_least_one, clock
from diffusion.process.times import TimeLaw, karras_sigmas, shift_time
from diffusion.tensors import Time, choose


class EDMProcess(Process):
    """Variance exploding: alpha = 1, sigma = t. Source: Karras et al. 2022 (EDM).

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        karras_sigmas(1, sigma_min, sigma_max, rho)
        self.sigma_min = self.min_t = sigma_min
        self.sigma_max = self.max_t = sigma_max
        self.rho = rho

    @property
    def end_t(self) -> float:
        return math.inf

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, half_log_snr: Time) -> Tensor:
        return torch.exp(-clock(half_log_snr))

    def timesteps(self, n: int, final_zero: bool = True) -> Tensor:
        """Karras's grid: n noise levels from sigma_max to sigma_min (n=1: sigma_max only), then 0."""
        sigmas = karras_sigmas(at_least_one(n), self.min_t, self.max_t, self.rho).flip(0)
        return torch.cat([sigmas, sigmas.new_zeros(1)]) if final_zero else sigmas

    def student_times(self, n: int) -> Tensor:
        table = karras_sigmas(1000, self.min_t, self.max_t, self.rho)
        return torch.cat([table[spaced_indices(n, 1000)], table.new_zeros(1)])

    def time_law(self, low: float = 0.0, high: float = 1.0) -> TimeLaw:
        a, b = self.min_t ** (1 / self.rho), self.max_t ** (1 / self.rho)
        at = [(a + share * (b - a)) ** self.rho for share in (low, high)]
        return TimeLaw("karras", low=at[0], high=at[1], rho=self.rho)


class FlowProcess(Process):
    """The linear path: alpha = 1 - t, sigma = t on [0, 1], velocity noise - x0.

    Args:
        shift: of the grids and of `time_law`; it alone never alters the path.
        num_steps: if given, every time snaps to the nearest entry of the shifted table
            1, 1 - 1/n, ..., 1/n, as in Self-Forcing.
        max_t: where the grids start.

    Raises:
        ValueError: shift <= 0, num_steps < 1 or max_t outside (0, 1].
    """

    def __init__(self, shift: float = 1.0, num_steps: int | None = None, max_t: float = 1.0) -> None:
        if shift <= 0 or (num_steps is not None and num_steps < 1) or not 0 < max_t <= 1:
            raise ValueError(
                f"need shift > 0, num_steps >= 1 (or None) and 0 < max_t <= 1, "
                f"got shift={shift}, num_steps={num_steps}, max_t={max_t}"
            )
        self.shift, self.num_steps, self.max_t = shift, num_steps, max_t

    @property
    def end_t(self) -> float:
        return 1.0

    def _sigma(self, t: Tensor) -> Tensor:
        if self.num_steps is None:
            return t
        steps = torch.arange(self.num_steps, dtype=torch.float64, device=t.device)
        table = shift_time(1 - steps / self.num_steps, self.shift)
        return table.take((t.unsqueeze(-1) - table).abs().argmin(-1))

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - self._sigma(t)

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, half_log_snr: Time) -> Tensor:
        return torch.sigmoid(-clock(half_log_snr))

    def timesteps(self, n: int) -> Tensor:
        """`linspace(max_t, 0, n+1)`, then the shift."""
        return shift_time(super().timesteps(n), self.shift)

    def time_law(self, low: float = 0.0, high: float = 1.0) -> TimeLaw:
        return TimeLaw("shifted", low=low * self.max_t, high=high * self.max_t, shift=self.shift)


class TrigProcess(Process):
    """TrigFlow: alpha = cos t, sigma = sigma_data * sin t on [0, pi/2].

    A TrigFlow network predicts velocity/sigma_data. Source: Lu and Song 2024 (sCM).

    Raises:
        ValueError: sigma_data <= 0.
    """

    max_t = math.pi / 2

    def __init__(self, sigma_data: float = 1.0) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data={sigma_data} is not allowed: it must be > 0")
        self.sigma_data = sigma_data

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.sin(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.cos(t)

    def time_at(self, half_log_snr: Time) -> Tensor:
        return torch.atan(torch.exp(-clock(half_log_snr)) / self.sigma_data)


class ContinuousVPProcess(Process):
    """Variance preserving in continuous time, alpha^2 + sigma^2 = 1, t in [0, 1].

    Args:
        schedule: "cosine": alpha = cos(pi t/2), sigma = sin(pi t/2). "linear": alpha = exp(-B/2)
            with B = beta_min*t + (beta_max-beta_min)*t^2/2 (Song et al. 2021); its
            sigma' is unbounded as t goes to 0.

    Raises:
        ValueError: unknown schedule, or not 0 < beta_min <= beta_max.
    """

    def __init__(self, schedule: str = "cosine", beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        choose("schedule", schedule, ("cosine", "linear"))
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}")
        self.schedule, self.beta_min, self.beta_max = schedule, beta_min, beta_max

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _rate(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t) if self.schedule == "cosine" else torch.exp(-self._integral(t) / 2)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t) if self.schedule == "cosine" else torch.sqrt(-torch.expm1(-self._integral(t)))

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self._sigma(t) if self.schedule == "cosine" else -self._rate(t) / 2 * self._alpha(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        if self.schedule == "cosine":
            return math.pi / 2 * self._alpha(t)
        return self._rate(t) / 2 * self._alpha(t) ** 2 / self._sigma(t)

    def time_at(self, half_log_snr: Time) -> Tensor:
        half_log_snr = clock(half_log_snr)
        if self.schedule == "cosine":
            return torch.atan(torch.exp(-half_log_snr)) * 2 / math.pi
        integral = -torch.nn.functional.logsigmoid(2 * half_log_snr)
        slope = self.beta_max - self.beta_min
        # The stable root: the textbook one cancels for small integrals and divides by a slope of 0.
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))


def spaced_indices(n: int, total: int) -> list[int]:
    """The first n of range(total-1, 0, -(total//n)): DMD2's student steps, also where n does not divide total."""
    indices = list(range(total - 1, 0, -max(total // at_least_one(n), 1)))
    if n > len(indices):
        raise ValueError(f"n={n} is not allowed: at most {len(indices)} steps of a table of {total}")
    return indices[:n]
