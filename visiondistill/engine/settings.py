"""What a run is, as data: validated here, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from visiondistill.engine.method import Method
from visiondistill.engine.report import tracker_classes


@dataclass(frozen=True)
class Optim:
    """Optimiser, schedule and clipping of one player.

    Args:
        name: a timm optimiser name ("adamw", "lamb", ...); timm's "sgd" is Nesterov's, "momentum" the
            plain one. adam, adamw, sgd and momentum run fused.
        lr: peak learning rate.
        weight_decay: not applied to biases and norms (timm's rule).
        clip: greatest norm of the player's whole gradient; None leaves it alone.
        schedule: of the learning rate after the warm-up: "constant", or "cosine" or "linear" down to 0 at the
            stage's end.
        warmup: steps of linear warm-up from 0.
        options: further arguments of the optimiser, such as `{"betas": [0.0, 0.99]}`.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(math.isfinite(self.lr) and self.lr >= 0, "lr", self.lr, "a finite number >= 0")
        _require(math.isfinite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a number > 0, or null for no clipping")
        _require(self.warmup >= 0, "warmup", self.warmup, "steps >= 0")
        _require(
            self.schedule in ("constant", "cosine", "linear"),
            "schedule",
            self.schedule,
            "'constant', 'cosine' or 'linear'",
        )


@dataclass(frozen=True)
class Stage:
    """A method with its own length; a run is one or more of them under one resume.

    Args:
        method: the method, or a function from the previous stage's `handover()` to it.
        steps: engine steps of this stage.
        optim: by player name; the key "default" serves players that are not named.
        name: shown in logs and used for the folder of the finished stage's state.
    """

    method: Method | Callable[[Any], Method]
    steps: int
    optim: Mapping[str, Optim] = field(default_factory=dict)
    name: str = "main"

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "at least 1: a run of zero updates trains nothing")

    def build(self, handover: Any = None) -> Method:
        """The method; a function that makes it is given what the previous stage handed over."""
        return self.method if isinstance(self.method, Method) else self.method(handover)


@dataclass(frozen=True)
class Run:
    """Settings of a run that are not the method's.

    Args:
        output_dir: the run folder; must be new or empty unless the run is resumed.
        batch_size: rows of the GLOBAL batch, over all processes and micro-batches.
        seed: decides batches, noise and dropout together with the step number.
        grad_accum_steps: micro-batches per process and step.
        mixed_precision: autocast of turns and `prepare`.
        channels_last: convolutions of all networks keep their weights, and so their features, in channels-last layout.
        device: "auto" takes CUDA where there is one.
        ema_decay: of the product's moving average; None keeps none.
        ema_warmup: let the decay rise as (1 + n) / (10 + n) to `ema_decay` over n updates.
        compile: one graph per turn, frozen networks on their own.
        compile_backend: of torch.compile.
        deterministic: use kernels that give the same bits every time, at some cost of speed. The CPU's always
            do; without it many of CUDA's add in any order, and a resumed run equals an uninterrupted one to
            rounding only.
        noise_block: rows per generator call (see `Draw`); None takes the largest power of two up
            to 8 that divides the micro-batch.
        log_every: steps between metric lines; also how often the finite guard is read.
        evaluate_every: steps between looks at the product on validation images (the `watch` of `train`); None
            for no look before the end of the run.
        checkpoint_every: steps between checkpoints; a run always ends with one.
        keep: newest checkpoints that are kept.
        keep_every: also keep each checkpoint whose step is a multiple of this.
        resume: "auto" continues the run in `output_dir` where there is one, a path continues that
            run folder or checkpoint, "none" starts anew.
        init_from: checkpoint whose weights (nothing else) the first stage's players start from.
        proof_window: executions of each turn over which proof of learning is judged.
        progress: show a progress bar.
        report_to: trackers that get the numbers of metrics.jsonl too: names that accelerate knows
            ("tensorboard", "wandb", "mlflow", ...), or class paths of `GeneralTracker`s of your own.
            One that fails or hangs costs a warning, never the run; see `report.py`.
    """

    output_dir: str
    batch_size: int
    seed: int = 0
    grad_accum_steps: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    device: str = "auto"
    ema_decay: float | None = None
    ema_warmup: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    deterministic: bool = False
    noise_block: int | None = None
    log_every: int = 50
    evaluate_every: int | None = None
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    resume: str = "none"
    init_from: str | None = None
    proof_window: int = 20
    progress: bool = True
    report_to: list[str] = field(default_factory=list)

    MAY_DIFFER: ClassVar = (
        "output_dir",
        "resume",
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "keep",
        "keep_every",
        "progress",
        "report_to",
        "init_from",
    )
    """Settings that cannot change the result, so that a resumed run may have others."""
    ROUNDING: ClassVar = ("grad_accum_steps",)
    """Settings that change it by rounding alone; a resumed run says so."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum_steps", "log_every", "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.batch_size % self.grad_accum_steps == 0,
            "grad_accum_steps",
            self.grad_accum_steps,
            f"a divisor of batch_size ({self.batch_size})",
        )
        _require(
            self.mixed_precision in ("no", "bf16", "fp16"),
            "mixed_precision",
            self.mixed_precision,
            "'no', 'bf16' or 'fp16'",
        )
        _require(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1), or null")
        for name in ("evaluate_every", "keep_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, ">= 1, or null")
        _require(self.proof_window >= 0, "proof_window", self.proof_window, ">= 0; 0 switches the proof off")
        names = isinstance(self.report_to, list) and all(isinstance(name, str) for name in self.report_to)
        _require(names, "report_to", self.report_to, "a list of names, as in [tensorboard]")
        if self.report_to:
            tracker_classes(self.report_to)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")
