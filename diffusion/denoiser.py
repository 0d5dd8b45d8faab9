"""One adapter around any network: its prediction type, its noise path, its guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion.process import KINDS, Process
from diffusion.process.base import SMALLEST_DIVISOR
from diffusion.tensors import Time, choose, expand_time, factor, lead, lift

Network = Callable[[Tensor, Tensor, Any], Tensor]
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network said at (x_t, t), readable as any prediction type; conversions happen on demand."""

    value: Tensor
    kind: str
    x_t: Tensor
    t: Time
    process: Process

    def of(self, kind: str) -> Tensor:
        """The prediction as `kind` (one of `diffusion.process.KINDS`), in x_t's dtype."""
        return self.process.convert(self.value, self.x_t, self.t, self.kind, kind)

    @property
    def x0(self) -> Tensor:
        return self.of("x0")

    @property
    def eps(self) -> Tensor:
        return self.of("eps")

    @property
    def v(self) -> Tensor:
        return self.of("v")

    @property
    def velocity(self) -> Tensor:
        return self.of("velocity")

    @property
    def score(self) -> Tensor:
        return self.of("score")


class Denoiser(nn.Module):
    """`denoiser(x_t, t, condition) -> Prediction` around `network(x_t, t, condition) -> Tensor`.

    The network always receives t as `[B]` (or `[B, F]`), at least float32, whatever was given;
    integer times stay integers.

    Args:
        network: any module or callable; a module's weights are the denoiser's.
        process: the noise path that the network was trained on.
        prediction_type: what the network returns, one of `diffusion.process.KINDS`.
        batched_guidance: evaluate both branches of guidance as one doubled batch (faster) or in two
            calls (half the memory).

    Raises:
        ValueError: unknown prediction type.
    """

    def __init__(
        self, network: Network, process: Process, prediction_type: str = "x0", *, batched_guidance: bool = True
    ) -> None:
        super().__init__()
        choose("prediction_type", prediction_type, KINDS)
        self.network, self.process = network, process
        self.prediction_type, self.batched_guidance = prediction_type, batched_guidance
        self._taps: dict[str, _Tap] = {}

    @property
    def sigma_min(self) -> float:
        """Noise that its clean samples keep, as consistency models' do: that of the boundary form, else 0."""
        return self.network.sigma_min if isinstance(self.network, EDMPreconditioner) else 0.0

    def forward(
        self,
        x_t: Tensor,
        t: Time,
        condition: Any = None,
        *,
        guidance_scale: float | Tensor = 1.0,
        guidance_interval: Interval | None = None,
        guidance_rescale: float = 0.0,
        null_condition: Any = None,
    ) -> Prediction:
        """Predict at (x_t, t).

        Args:
            x_t: `[B, ...]`.
            t: `[B]`, `[B, F]`, 0-d tensor or number, in the process's own time.
            condition: what the network takes: a tensor or a nest of tensors, batch first; or None.
            guidance_scale: s of `uncond + s*(cond - uncond)`; 1 is off and costs one pass. A number,
                or a tensor `[B]`.
            guidance_interval: (low, high) in the process's own time (EDM: sigma), both included; at other
                times, frame by frame, the conditional prediction counts alone (Kynkäänniemi et al. 2024,
                arXiv 2404.07724, equations 5 and 6). None: all times. Both branches are evaluated at every time.
            guidance_rescale: phi of `rescale_guidance`, in [0, 1], on what the network predicts; 0 is off.
            null_condition: the unconditional branch's condition, of the condition's structure.

        Raises:
            ValueError: guidance without a null condition, or as of `check_guidance`.
        """
        check_guidance(self.process, guidance_interval, guidance_rescale)
        times = expand_time(t, x_t)
        if isinstance(guidance_scale, int | float) and guidance_scale == 1:
            value = self.network(x_t, times, condition)
        elif null_condition is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a null_condition; 1 switches guidance off")
        else:
            branches = self._branches(x_t, times, null_condition, condition)
            value = _guided(*branches, times, guidance_scale, guidance_interval, guidance_rescale)
        return Prediction(value, self.prediction_type, x_t, t, self.process)

    def features(
        self, x_t: Tensor, t: Time, condition: Any = None, *, taps: Sequence[str]
    ) -> tuple[Prediction, list[Tensor]]:
        """Predict, and return what inner modules gave on the way.

        The first call for a tap leaves a hook on the module, which is idle in all other calls:
        a hook that came and went with the call could not be compiled.

        Args:
            x_t, t, condition: as of `forward`; without guidance.
            taps: paths of modules in the network, or their ends where these are unique ("mid_block").

        Returns:
            The prediction, and one tensor per tap (of a tuple, the first).

        Raises:
            ValueError: no such module, or several.
        """
        opened = [self._tap(path) for path in taps]
        for tap in opened:
            tap.open = True
        try:
            prediction = self(x_t, t, condition)
            return prediction, [tap.seen for tap in opened]
        finally:
            for tap in opened:
                tap.open, tap.seen = False, None

    def _tap(self, path: str) -> _Tap:
        if path not in self._taps:
            self._taps[path] = _Tap()
            _inner(self.network, path).register_forward_hook(self._taps[path])
        return self._taps[path]

    def _branches(self, x_t: Tensor, t: Tensor, null: Any, condition: Any) -> list[Tensor]:
        if not self.batched_guidance:
            return [self.network(x_t, t, null), self.network(x_t, t, condition)]
        both = tree_map(lambda a, b: torch.cat([a, b]), null, condition)
        return list(self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2))

    def extra_repr(self) -> str:
        return f"process={self.process!r}, prediction_type={self.prediction_type!r}"


class _Tap:
    """A forward hook that keeps a module's output while it is open."""

    def __init__(self) -> None:
        self.open, self.seen = False, None

    def __call__(self, module: nn.Module, given: Any, output: Any) -> None:
        if self.open:
            self.seen = output[0] if isinstance(output, tuple) else output


def _inner(network: Network, path: str) -> nn.Module:
    named = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    fitting = [name for name in named if name == path or name.endswith(f".{path}")]
    if path in named or len(fitting) == 1:
        return named[path if path in named else fitting[0]]
    if fitting:
        raise ValueError(f"tap {path!r} is the end of several modules' paths: write out one of {', '.join(fitting)}")
    outer, middle = [name for name in named if name and name.count(".") <= 1], _middle_block(named)
    raise ValueError(
        f"tap {path!r} is no module of {type(network).__name__}; it has {', '.join(outer) or 'none'}"
        + (f"; take {middle!r}, its middle block" if middle else "")
    )


def _middle_block(named: Mapping[str, nn.Module]) -> str:
    """A UNet's "mid_block", or the middle one of the longest of the outermost lists of modules; "" for neither."""
    if unets := [name for name in named if name.endswith("mid_block")]:
        return unets[0]
    counts = {name: len(module) for name, module in named.items() if isinstance(module, nn.ModuleList)}
    blocks = min(counts, key=lambda name: (name.count("."), -counts[name]), default=None)
    return "" if blocks is None else f"{blocks}.{counts[blocks] // 2}"


class EDMPreconditioner(nn.Module):
    """A raw network F as an x0 network on the EDM path: D = c_skip*x + c_out*F(c_in*x, c_noise).

    Wrap it: `Denoiser(EDMPreconditioner(network), EDMProcess(), "x0")`. F receives c_noise = ln(sigma)/4
    as its time.

    Args:
        network: `network(x, c_noise, condition)`, input and output of unit variance.
        sigma_data: standard deviation of the data.
        sigma_min: > 0 for consistency models' boundary form, see `edm_scalings`.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.0) -> None:
        super().__init__()
        self.network, self.sigma_data, self.sigma_min = network, sigma_data, sigma_min

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = edm_scalings(t, self.sigma_data, self.sigma_min)
        x = lift(x_t)
        raw = self.network((lead(c_in, x) * x).to(x_t.dtype), c_noise, condition)
        return (lead(c_skip, x) * x + lead(c_out, x) * raw).to(x_t.dtype)


def edm_scalings(
    sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EDM's preconditioning coefficients (Karras et al. 2022, table 1), each of sigma's shape.

    Args:
        sigma: noise levels, >= 0.
        sigma_min: > 0 gives consistency models' boundary form, the identity at sigma_min
            (Song et al. 2023, appendix C); their network is conditioned on 1000*c_noise.

    Returns:
        c_skip, c_out, c_in, c_noise of D(x) = c_skip*x + c_out*F(c_in*x, c_noise).
    """
    sigma = lift(sigma)
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    c_out = (sigma - sigma_min) * sigma_data / total.sqrt()
    return c_skip, c_out, total.rsqrt(), sigma.clamp(min=1e-6).log() / 4


def check_guidance(process: Process, interval: Interval | None, rescale: float) -> None:
    """See that guidance can be restricted and rescaled so.

    Raises:
        ValueError: an interval that is empty or leaves the path's times, or a rescale outside [0, 1].
    """
    if interval is not None and not process.min_t <= interval[0] <= interval[1] <= process.max_t:
        raise ValueError(
            f"guidance_interval={list(interval)} is not allowed: it is [low, high] in the time of {process!r}, which "
            f"runs from {process.min_t:g} to {process.max_t:g}; null guides at all times"
        )
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale={rescale} is not allowed: from 0 (off) to 1")


def _guided(
    unconditional: Tensor, conditional: Tensor, t: Tensor, scale: float | Tensor, interval: Interval | None, phi: float
) -> Tensor:
    """Guidance, rescaled, within the interval; the conditional prediction itself outside it."""
    lifted = lift(conditional)
    value = apply_guidance([lift(unconditional), lifted], [scale])
    if phi:
        value = rescale_guidance(value, lifted, phi, leading=t.ndim)
    if interval is not None:
        value = torch.where(lead((t >= interval[0]) & (t <= interval[1]), value), value, lifted)
    return value.to(conditional.dtype)


def rescale_guidance(guided: Tensor, conditional: Tensor, phi: float, *, leading: int = 1) -> Tensor:
    """phi*guided*std(conditional)/std(guided) + (1 - phi)*guided, against the contrast that large scales add.

    Source: Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16; `rescale_noise_cfg` of diffusers.

    Args:
        guided, conditional: predictions `[B, ...]` of one type.
        phi: in [0, 1].
        leading: axes that have a standard deviation for each entry: 1 for samples, as in the paper, 2 for
            the frames of `[B, F, ...]`, which differ where they have noise levels of their own.

    Returns:
        `[B, ...]` in guided's dtype, float32 inside.
    """
    # A network that is still zero everywhere has no contrast to divide by.
    value, axes = lift(guided), tuple(range(leading, guided.ndim))
    wanted, found = (lift(each).std(axes, correction=0, keepdim=True) for each in (conditional, value))
    return (value * (1 - phi + phi * wanted / found.clamp(min=SMALLEST_DIVISOR))).to(guided.dtype)


def apply_guidance(branches: Sequence[Tensor], scales: Sequence[float | Tensor]) -> Tensor:
    """b0 + sum_i s_i*(b_i - b_{i-1}): classifier-free guidance for one or more conditions.

    [uncond, cond] and [s] give uncond + s*(cond - uncond); three branches guide by text, then by
    audio. Papers that write cond + w*(cond - uncond) mean s = w + 1.

    Args:
        branches: n + 1 predictions `[B, ...]` of one type.
        scales: n numbers or tensors `[B]`.

    Returns:
        `[B, ...]` in the branches' dtype, float32 inside.

    Raises:
        ValueError: the lengths are not n + 1 and n.
    """
    if len(branches) != len(scales) + 1 or not scales:
        raise ValueError(f"{len(branches)} branches need {len(branches) - 1} scales (at least 1), got {len(scales)}")
    lifted = [lift(branch) for branch in branches]
    guided = lifted[0]
    for scale, before, after in zip(scales, lifted, lifted[1:], strict=False):
        guided = guided + factor(scale, after) * (after - before)
    return guided.to(branches[0].dtype)
