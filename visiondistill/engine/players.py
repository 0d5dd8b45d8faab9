"""What the engine keeps of each player: its trainable tensors, its modes, its optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.optim import build_optimizer, build_scheduler, is_gated
from visiondistill.engine.settings import Optim


class Player:
    """One trained network.

    Its trainable tensors are those that require gradients when the stage begins: of a LoRA
    network the adapters alone. Everything else about it is rebuilt by its constructor, not saved.
    """

    def __init__(
        self, name: str, module: nn.Module, settings: Optim, steps: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.name, self.module, self.settings = name, module, settings
        self.named = {key: p for key, p in module.named_parameters() if p.requires_grad}
        if not self.named:
            raise SettingsError(f"player '{name}' has no parameter that requires a gradient; freeze it by `frozen`")
        self.parameters = list(self.named.values())
        self.optimizer = optimizer or build_optimizer(module, settings, name)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * group.get("lr_scale", 1.0)
        self.scheduler = build_scheduler(self.optimizer, settings, steps)
        self.gated = is_gated(self.optimizer)
        self.train_modes, self.eval_modes = _modes(module)

    def schedule(self, step: int) -> None:
        if self.scheduler is not None:
            self.scheduler.step_update(step)

    def gradients(self) -> list[Tensor]:
        return [gradient for p in self.parameters if (gradient := p.grad) is not None]


class Buffers:
    """The players' running statistics, flattened by type, so that undoing them takes two copies, not two a layer."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found: dict[int, tuple[nn.Module, str, Tensor]] = {}
        for module in modules:
            for part in module.modules():
                for name, buffer in part._buffers.items():
                    if buffer is not None and name not in part._non_persistent_buffers_set and buffer.numel():
                        found.setdefault(id(buffer), (part, name, buffer))
        by_dtype: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
        for entry in found.values():
            by_dtype.setdefault(entry[2].dtype, []).append(entry)
        self.live = [_flatten(entries) for entries in by_dtype.values()]
        self.saved = [flat.clone() for flat in self.live]

    def remember(self) -> None:
        for saved, live in zip(self.saved, self.live, strict=True):
            saved.copy_(live)

    def settle(self, hold: Tensor, shared: bool = False) -> None:
        """Go back to what was remembered where `hold` is set; remember the outcome.

        Args:
            hold: 0-d, 1 where the update is refused.
            shared: all processes take the first one's statistics, as under DDP: a checkpoint holds no
                others, and a player that is read in eval mode must be the same network everywhere.
        """
        if self.live:
            held = hold.bool()
            for saved, live in zip(self.saved, self.live, strict=True):
                if shared:
                    dist.broadcast(live, 0)
                torch.where(held, saved, live, out=live)
                saved.copy_(live)


class LossScale:
    """fp16's loss scale of one turn: halved where a gradient overflowed, doubled after 2,000 good updates."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.overflow = torch.zeros((), device=device)

    def update(self) -> None:
        torch._amp_update_scale_(self.scale, self.growth, self.overflow, 2.0, 0.5, 2000)


def _flatten(entries: Sequence[tuple[nn.Module, str, Tensor]]) -> Tensor:
    flat = torch.cat([buffer.detach().reshape(-1) for _, _, buffer in entries])
    start = 0
    for module, name, buffer in entries:
        module._buffers[name] = flat[start : start + buffer.numel()].view(buffer.shape)
        start += buffer.numel()
    return flat


def _modes(module: nn.Module) -> tuple[list[tuple[dict, bool]], list[tuple[dict, bool]]]:
    """What `train()` and `eval()` set: (attributes of a submodule, their `training`) for every submodule."""
    # Asked once, because networks override `train()`; later flips walk the answer.
    module.eval()
    still = [(part.__dict__, part.training) for part in module.modules()]
    module.train()
    return [(part.__dict__, part.training) for part in module.modules()], still
