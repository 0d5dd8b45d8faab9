"""The variance-preserving path on a table of steps, as diffusers' models are trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.process.base import Process, at_least_one, clock
from diffusion.process.paths import spaced_indices
from diffusion.process.times import TimeLaw
from diffusion.tensors import Time, choose


class VPProcess(Process):
    """alpha = sqrt(alphas_cumprod[t]), sigma = sqrt(1 - alphas_cumprod[t]).

    t is an index 0 ... T-1; a negative t means `final_alpha_cumprod`; between indices log(alpha/sigma)
    is interpolated linearly. There is no continuous time, so derivatives and "velocity" raise
    `NotImplementedError`.

    Args:
        alphas_cumprod: `[T]`, falling, in [0, 1].
        final_alpha_cumprod: of the clean end (t < 0).

    Raises:
        ValueError: the table is not 1-d, not falling or leaves [0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor, final_alpha_cumprod: float = 1.0) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or table.numel() < 1 or (table.diff() >= 0).any() or table.min() < 0 or table.max() > 1:
            raise ValueError("alphas_cumprod must be a falling 1-d table of numbers in [0, 1]")
        self.alphas_cumprod, self.final_alpha_cumprod = table, final_alpha_cumprod
        self.max_t = float(table.numel() - 1)
        # The last entry answers t < 0, so that the look-up is one gather.
        with_final = torch.cat([table, table.new_tensor([final_alpha_cumprod])])
        self._tables = {table.device: (with_final.log() - torch.log1p(-with_final)) / 2}

    @classmethod
    def from_betas(
        cls,
        schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_timesteps: int = 1000,
        **kw,
    ) -> VPProcess:
        """The tables of diffusers' schedulers.

        Args:
            schedule: "linear", "scaled_linear" (linear in sqrt(beta)) or "squaredcos_cap_v2"
                (Nichol and Dhariwal 2021, which reads neither beta).
            kw: arguments of the constructor.
        """
        choose("schedule", schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        elif schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        else:
            edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
            bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        return cls(torch.cumprod(1 - betas, 0), **kw)

    def __repr__(self) -> str:
        table = self.alphas_cumprod
        return (
            f"VPProcess(num_timesteps={table.numel()}, first={table[0]:.9g}, last={table[-1]:.9g}, "
            f"sum={table.sum():.15g}, final_alpha_cumprod={self.final_alpha_cumprod:.9g})"
        )

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]

    def half_log_snr(self, t: Time) -> Tensor:
        t = clock(t)
        table = self._table(t.device)
        last = table.numel() - 2
        left = t.clamp(0, last).floor()
        share = t.clamp(0, last) - left
        # Taken, because to index by a single number is to read it on the host.
        low, high = table.take(left.long()), table.take((left.long() + 1).clamp(max=last))
        # An index must hit its entry exactly, also beside an infinite one (zero terminal SNR).
        between = torch.where(share == 0, low, low + share * (high - low))
        return torch.where(t < 0, table[-1], between)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self.half_log_snr(t)).sqrt()

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self.half_log_snr(t)).sqrt()

    def time_at(self, half_log_snr: Time) -> Tensor:
        """Fractional index, clamped to the table."""
        value = clock(half_log_snr)
        table = self._table(value.device)[:-1]
        last = table.numel() - 1
        right = torch.searchsorted(-table, -value.contiguous()).clamp(1, max(last, 1))
        low, high = table.take(right - 1), table.take(right.clamp(max=last))
        index = right - 1 + (low - value) / (low - high)
        return torch.where(value >= table[0], 0.0, torch.where(value <= table[-1], float(last), index))

    def timesteps(self, n: int, spacing: str = "leading", steps_offset: int = 0) -> Tensor:
        """Indices of n steps as diffusers spaces them, int64 `[n+1]`, -1 last.

        Args:
            spacing: "leading": arange(n)*(T//n) + steps_offset; "trailing": round(T - i*T/n) - 1;
                "linspace": round(linspace(T-1, 0, n)).
        """
        choose("spacing", spacing, ("leading", "trailing", "linspace"))
        total = self.alphas_cumprod.numel()
        if not 1 <= n <= total:
            raise ValueError(f"n={n} is not allowed: 1 to {total} steps")
        if spacing == "leading":
            steps = (torch.arange(n) * (total // n)).flip(0) + steps_offset
        elif spacing == "trailing":
            steps = torch.round(total - torch.arange(n, dtype=torch.float64) * total / n).long() - 1
        else:
            steps = torch.linspace(total - 1, 0, n, dtype=torch.float64).round().long()
        return torch.cat([steps, torch.tensor([-1])])

    def student_times(self, n: int) -> Tensor:
        return torch.tensor([*spaced_indices(at_least_one(n), self.alphas_cumprod.numel()), -1])

    def time_law(self, low: float = 0.0, high: float = 1.0) -> TimeLaw:
        total = self.alphas_cumprod.numel()
        return TimeLaw("index", low=int(low * total), high=min(int(high * total), total - 1))

    def start(self, noise: Tensor, t: Time | None = None) -> Tensor:
        """Unit noise as it is: these models are sampled so, although sigma at the last step is below 1."""
        return noise
