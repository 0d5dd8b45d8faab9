"""The base of every noise path: what follows from alpha, sigma and their derivatives alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.times import TimeLaw
from diffusion.tensors import Time, choose, lead, lift

KINDS = ("x0", "eps", "v", "velocity", "score")
"""What a network may predict: clean sample; unit noise; alpha*eps - sigma*x0; dx_t/dt; -eps/sigma."""

SMALLEST_DIVISOR = 1e-6


class Process:
    """A path `x_t = alpha(t) * x0 + sigma(t) * noise` from data (t small) to noise (t large).

    A path defines `_alpha`, `_sigma`, their derivatives and `time_at`, all on float64 tensors; the
    rest follows. Times are `[B]`, `[B, F]`, 0-d tensors or numbers and lead the batch.
    Coefficients are float64 of t's shape; samples keep the dtype of the sample given.
    """

    min_t: float = 0.0
    max_t: float = 1.0

    @property
    def end_t(self) -> float:
        """Where the path itself ends, which grids need not reach."""
        return self.max_t

    def _alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _alpha_prime(self, t: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no continuous time, hence no velocity")

    def _sigma_prime(self, t: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no continuous time, hence no velocity")

    def time_at(self, half_log_snr: Time) -> Tensor:
        """The time at which log(alpha/sigma) has this value."""
        raise NotImplementedError

    def alpha(self, t: Time) -> Tensor:
        return self._alpha(clock(t))

    def sigma(self, t: Time) -> Tensor:
        return self._sigma(clock(t))

    def alpha_prime(self, t: Time) -> Tensor:
        """d alpha / dt."""
        return self._alpha_prime(clock(t))

    def sigma_prime(self, t: Time) -> Tensor:
        """d sigma / dt."""
        return self._sigma_prime(clock(t))

    def half_log_snr(self, t: Time) -> Tensor:
        """log(alpha/sigma): +inf at the clean end, falling with t."""
        return self.alpha(t).log() - self.sigma(t).log()

    def timesteps(self, n: int) -> Tensor:
        """Sampling grid of n steps, `[n+1]` descending, the clean end last."""
        return self.max_t * (1 - torch.arange(at_least_one(n) + 1, dtype=torch.float64) / n)

    def student_times(self, n: int) -> Tensor:
        """The times at which an n-step student is trained and must be sampled, `[n+1]`, the clean end last."""
        return self.timesteps(n)

    def time_law(self, low: float = 0.0, high: float = 1.0) -> TimeLaw:
        """The path's own uniform law; `low` and `high` are shares of its way from clean to noise."""
        return TimeLaw("uniform", low=low * self.max_t, high=high * self.max_t)

    def start(self, noise: Tensor, t: Time | None = None) -> Tensor:
        """What a sampler that begins at time t (default: `max_t`) takes for pure unit-variance noise."""
        t = self.max_t if t is None else t
        return (lead(self.sigma(t), noise).to(lift(noise).dtype) * noise).to(noise.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """alpha(t)*x0 + sigma(t)*noise in x0's dtype (float32 inside)."""
        return _mix(x0, noise, self.alpha(t), self.sigma(t))

    def velocity(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """The conditional velocity dx_t/dt = alpha'(t)*x0 + sigma'(t)*noise in x0's dtype."""
        return _mix(x0, noise, self.alpha_prime(t), self.sigma_prime(t))

    def noised(self, x0: Tensor, noise: Tensor, t: Time) -> Noised:
        """`add_noise` as a value that still knows what it was made of."""
        return Noised(self.add_noise(x0, noise, t), t, x0, noise, self)

    def convert(self, prediction: Tensor, x_t: Tensor, t: Time, source: str, target: str) -> Tensor:
        """Re-express a prediction made at (x_t, t) as another of `KINDS`.

        float64 inside, x_t's dtype out; differentiable in `prediction` and `x_t`. Divisors alpha and
        sigma are kept at 1e-6 or more in size. From "velocity" nothing but the path's determinant
        alpha*sigma' - sigma*alpha' is divided by, so that x0 is exact at pure noise too. Equal
        source and target return the input.

        Raises:
            ValueError: unknown kind.
            NotImplementedError: "velocity" on a path without continuous time.
        """
        choose("source", source, KINDS)
        choose("target", target, KINDS)
        if source == target:
            return prediction
        point = _Point(self, x_t, t)
        p = prediction.double()
        if target == "x0":
            return point.x0(p, source).to(x_t.dtype)
        if target in ("eps", "score"):
            eps = point.eps(p, source)
            return (eps if target == "eps" else -eps / away_from_zero(point.sigma)).to(x_t.dtype)
        a, b = (-point.sigma, point.alpha) if target == "v" else (point.alpha_prime, point.sigma_prime)
        return (a * point.x0(p, source) + b * point.eps(p, source)).to(x_t.dtype)

    def to_linear(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """The same point on the linear path x = (1-tau)*x0 + tau*noise, whose velocity is noise - x0.

        Returns:
            x in x_t's dtype, and tau = sigma/(alpha+sigma), float64 of t's shape.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (x_t.double() / lead(alpha + sigma, x_t)).to(x_t.dtype), sigma / (alpha + sigma)

    def from_linear(self, x: Tensor, tau: Time) -> tuple[Tensor, Tensor]:
        """Inverse of `to_linear`: the point of this path, and its time (float64)."""
        tau = clock(tau)
        t = self.time_at(torch.log1p(-tau) - tau.log())
        return (x.double() * lead(self.alpha(t) + self.sigma(t), x)).to(x.dtype), t

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if isinstance(v, int | float | str))
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, eq=False)
class Noised:
    """A noised sample and what it was made of: `x_t`, its time, the clean sample and the noise."""

    x_t: Tensor
    t: Time
    x0: Tensor
    noise: Tensor
    process: Process

    def of(self, kind: str) -> Tensor:
        """The value that a perfect network of this prediction type would be trained towards."""
        choose("kind", kind, KINDS)
        if kind in ("x0", "eps"):
            return self.x0 if kind == "x0" else self.noise
        if kind == "velocity":
            return self.process.velocity(self.x0, self.noise, self.t)
        if kind == "v":
            return _mix(self.x0, self.noise, -self.process.sigma(self.t), self.process.alpha(self.t))
        return (-self.noise.double() / away_from_zero(lead(self.process.sigma(self.t), self.noise))).to(self.x0.dtype)


class _Point:
    """x0 and eps of predictions of any kind at one (x_t, t), in float64."""

    def __init__(self, process: Process, x_t: Tensor, t: Time) -> None:
        self._process, self._t, self.x_t = process, t, x_t.double()
        self.alpha, self.sigma = lead(process.alpha(t), x_t), lead(process.sigma(t), x_t)

    @property
    def alpha_prime(self) -> Tensor:
        return lead(self._process.alpha_prime(self._t), self.x_t)

    @property
    def sigma_prime(self) -> Tensor:
        return lead(self._process.sigma_prime(self._t), self.x_t)

    def x0(self, p: Tensor, kind: str) -> Tensor:
        if kind == "x0":
            return p
        if kind == "v":
            return (self.alpha * self.x_t - self.sigma * p) / (self.alpha**2 + self.sigma**2)
        if kind == "velocity":
            return (self.sigma_prime * self.x_t - self.sigma * p) / self._determinant()
        eps = p if kind == "eps" else -self.sigma * p
        return (self.x_t - self.sigma * eps) / away_from_zero(self.alpha)

    def eps(self, p: Tensor, kind: str) -> Tensor:
        if kind == "eps":
            return p
        if kind == "score":
            return -self.sigma * p
        if kind == "v":
            return (self.sigma * self.x_t + self.alpha * p) / (self.alpha**2 + self.sigma**2)
        if kind == "velocity":
            return (self.alpha * p - self.alpha_prime * self.x_t) / self._determinant()
        return (self.x_t - self.alpha * p) / away_from_zero(self.sigma)

    def _determinant(self) -> Tensor:
        return self.alpha * self.sigma_prime - self.sigma * self.alpha_prime


def clock(t: Time) -> Tensor:
    """Any time as a float64 tensor."""
    return t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def away_from_zero(x: Tensor) -> Tensor:
    """Keep the sign, and at least 1e-6 of size."""
    return torch.where(x < 0, x.clamp(max=-SMALLEST_DIVISOR), x.clamp(min=SMALLEST_DIVISOR))


def at_least_one(n: int) -> int:
    if n < 1:
        raise ValueError(f"n={n} is not allowed: at least 1 step")
    return n


def _mix(x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Lifted by name: a 0-d coefficient would leave half precision as it is.
    x, n = lift(x0), lift(noise)
    return (lead(a, x).to(x.dtype) * x + lead(b, x).to(x.dtype) * n).to(x0.dtype)
