"""What a stage is made of and its checkpoints hold: players, optimisers, averages, state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.engine.ema import Ema
from visiondistill.engine.errors import ResumeError, SettingsError, some
from visiondistill.engine.launch import World
from visiondistill.engine.method import Method, Turn
from visiondistill.engine.players import Buffers, LossScale, Player
from visiondistill.engine.settings import Optim, Run, Stage
from visiondistill.engine.state import fingerprint, pack_optimizer, unpack_optimizer

Tensors = dict[str, dict[str, Tensor]]


class Kept:
    """What outlives a stage: optimisers and averages of modules that the next stage has too."""

    def __init__(self) -> None:
        self.optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
        self.averages: dict[nn.Module, Ema] = {}


class Assembly:
    """A stage's method on its device, with everything that is saved.

    Raises:
        SettingsError: settings that name no player, turns of one name, or a trainable tensor that
            belongs to no player.
    """

    def __init__(self, stage: Stage, method: Method, run: Run, world: World, kept: Kept) -> None:
        self.stage, self.method, self.run, self.world = stage, method, run, world
        method.to(world.device)
        if run.channels_last:
            # A convolution takes the layout of its weight, whatever that of its input: no image is laid out anew.
            nn.utils.convert_conv2d_weight_memory_format(method, torch.channels_last)
            nn.utils.convert_conv3d_weight_memory_format(method, torch.channels_last_3d)
        unknown = set(stage.optim) - set(method.players) - {"default"}
        if unknown:
            raise SettingsError(f"optim names {sorted(unknown)}; the players are {list(method.players)}")
        self.players = {
            name: Player(name, module, self._settings(name), stage.steps, kept.optimizers.get(module))
            for name, module in method.players.items()
        }
        self.buffers = Buffers(method.players.values())
        self.turns: tuple[Turn, ...] = method.turns()
        _check_turns(self.turns, self.players, stage)
        self.ema = self._average(kept)
        self.scales = {turn.name: LossScale(world.device) for turn in self.turns if run.mixed_precision == "fp16"}
        self.state = self._own_state()
        for name, module in method.players.items():
            kept.optimizers[module] = self.players[name].optimizer

    def _settings(self, player: str) -> Optim:
        return self.stage.optim.get(player, self.stage.optim.get("default", Optim()))

    def _average(self, kept: Kept) -> Ema | None:
        if self.run.ema_decay is None:
            return None
        product = self.method.product()
        if product in kept.averages:
            kept.averages[product].follow()
        else:
            kept.averages[product] = Ema(product, self.run.ema_decay, self.run.ema_warmup)
        return kept.averages[product]

    def _own_state(self) -> dict[str, Tensor]:
        frozen = {id(t) for t in self.method.frozen.state_dict(keep_vars=True).values()}
        trained = {id(p) for player in self.players.values() for p in player.parameters}
        own: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.method.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in trained:
                if tensor.requires_grad:
                    raise SettingsError(f"'{name}' requires a gradient but belongs to no player: nothing would move it")
            elif id(tensor) not in frozen:
                own.setdefault(id(tensor), (name, tensor))
        return dict(own.values())

    @property
    def noise_dtype(self) -> torch.dtype:
        """Noise is drawn in fp32, or in fp64 for networks of that precision."""
        return torch.promote_types(next(iter(self.players.values())).parameters[0].dtype, torch.float32)

    def rebuilt(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint leaves out because the constructors make it again."""
        own = {id(tensor) for tensor in self.state.values()}
        return {
            name: tensor for name, tensor in self.method.state_dict(keep_vars=True).items() if id(tensor) not in own
        }

    def pack(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors by file name and key, and each player's optimiser state that is not tensors."""
        tensors: Tensors = {"weights": self.state, "optimizers": {}, "averages": {}, "scales": {}}
        numbers = {}
        for name, player in self.players.items():
            own, numbers[name] = pack_optimizer(player.optimizer)
            tensors["optimizers"] |= {f"{name}/{key}": tensor for key, tensor in own.items()}
        if self.ema is not None:
            tensors["averages"] = dict(zip(self.ema.names, self.ema.values, strict=True))
            tensors["counters"] = {"average": self.ema.updates}
        for name, scale in self.scales.items():
            tensors["scales"] |= {f"{name}.scale": scale.scale, f"{name}.growth": scale.growth}
        return {name: group for name, group in tensors.items() if group}, numbers

    def unpack(self, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        """Take over what `pack` gave.

        Raises:
            ResumeError: keys or shapes differ.
        """
        expected, _ = self.pack()
        self.load_weights(tensors.get("weights", {}))
        if self.ema is not None:
            _copy(dict(zip(self.ema.names, self.ema.values, strict=True)), tensors.get("averages", {}), "averages")
            _copy(expected["counters"], tensors.get("counters", {}), "counters")
        if "scales" in expected:
            _copy(expected["scales"], tensors.get("scales", {}), "scales")
        for name, player in self.players.items():
            prefix = f"{name}/"
            own = {k.removeprefix(prefix): t for k, t in tensors.get("optimizers", {}).items() if k.startswith(prefix)}
            unpack_optimizer(player.optimizer, own, numbers[name])

    def schedule(self, step: int) -> None:
        """Bring the learning rates to where they stood after `step` steps."""
        for name, player in self.players.items():
            moves = [turn for turn in self.turns if name in turn.moves and turn.count(step)]
            if moves:
                player.schedule(max(t.start + t.offset + (t.count(step) - 1) * t.every for t in moves))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights and state, strictly.

        Raises:
            ResumeError: keys or shapes differ.
        """
        _copy(self.state, weights, "weights")

    def fingerprint(self) -> str:
        return fingerprint(self.rebuilt())

    def release(self) -> None:
        """Leave the players as they came: trainable, without gradients."""
        for player in self.players.values():
            for parameter in player.parameters:
                parameter.requires_grad_(True)
                parameter.grad = None

    def describe(self) -> dict[str, Any]:
        """What decides the result, as plain data, to compare a run with the one it continues."""
        hyperparameters = {
            name or "method": found for name, module in self.method.named_modules() if (found := _plain(module))
        }
        return {
            "method": f"{type(self.method).__module__}.{type(self.method).__qualname__}",
            "steps": self.stage.steps,
            "hyperparameters": hyperparameters,
            "streams": {name: _plain(stream) for name, stream in self.method.streams.items()},
            "turns": {t.name: [list(t.moves), t.every, t.offset, t.start] for t in self.turns},
            "optim": {name: vars(player.settings) for name, player in self.players.items()},
            "shapes": {name: list(tensor.shape) for name, tensor in self.state.items()},
        }


def _check_turns(turns: tuple[Turn, ...], players: Mapping[str, Player], stage: Stage) -> None:
    names = [turn.name for turn in turns]
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"turns need at least one and different names, got {names}")
    for turn in turns:
        unknown = [name for name in turn.moves if name not in players]
        if unknown:
            raise SettingsError(f"turn '{turn.name}' moves {unknown}; the players are {list(players)}")
        if not turn.count(stage.steps):
            raise SettingsError(
                f"turn '{turn.name}' is never due in the {stage.steps} steps of stage '{stage.name}' "
                f"(start {turn.start}, every {turn.every}, offset {turn.offset}): it would train nothing"
            )


def _plain(thing: object) -> dict[str, Any]:
    """The settings of a module or stream: its public attributes, as far as they are plain data.

    A class may list in `PROVENANCE` the attributes that say where it comes from rather than what it
    is; they are left out, as weights are compared by value.
    """
    told, left_out = {}, getattr(thing, "PROVENANCE", ())
    for name, value in sorted(vars(thing).items()):
        if _decides(name) and name not in left_out and not isinstance(value, nn.Module):
            with suppress(TypeError):
                told[name] = _data(value)
    return told


def _decides(attribute: str) -> bool:
    """Whether an attribute can change the result, by its name."""
    # Counters and caches are private by convention, `workers` cannot change a batch, streams are described apart.
    return attribute[0] != "_" and attribute not in ("training", "workers", "streams")


def _data(value: object) -> Any:
    """`value` as plain data; objects are what their public attributes are.

    Raises:
        TypeError: it holds something else (tensors, modules, functions, data sets).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(name): _data(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_data(entry) for entry in value]
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Tensor | Callable):
        return {name: _data(entry) for name, entry in vars(value).items() if _decides(name)}
    raise TypeError(type(value).__name__)


def _copy(into: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    missing, extra = sorted(set(into) - set(source)), sorted(set(source) - set(into))
    misshaped = [
        f"{name}: {list(source[name].shape)} for {list(into[name].shape)}"
        for name in into
        if name in source and source[name].shape != into[name].shape
    ]
    if missing or extra or misshaped:
        raise ResumeError(
            f"{what} of the checkpoint do not fit this run: missing {some(missing)}, unexpected {some(extra)}, "
            f"misshaped {some(misshaped)}"
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(source[name])
