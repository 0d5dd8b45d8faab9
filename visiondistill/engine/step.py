"""One engine step: prepare every micro-batch, then play each due turn.

A turn: loss and backward over the micro-batches, reduction over processes, finite guard, `combine`,
clipping, optimisers, state writes, moving average. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visiondistill.engine.assembly import Assembly
from visiondistill.engine.compile import compiled
from visiondistill.engine.errors import NoGradient, NotLearning, SettingsError
from visiondistill.engine.method import Batch, Carry, Method, Terms, Turn
from visiondistill.engine.players import Player
from visiondistill.engine.proof import Proof
from visiondistill.engine.rng import Draw, Reseed
from visiondistill.engine.shares import Rows, Shares
from visiondistill.engine.tree import tree_join


class Guard:
    """One flag on the device, set by the first non-finite term or gradient and never cleared.

    `refused` counts the turns that were played with the flag set, so that the first of them can
    be named when the flag is finally read.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)
        self.refused = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)

    def check(self, tensors: Sequence[Tensor], flag: Tensor | None = None, inverse_scale: Tensor | None = None) -> None:
        """Set the flag (this guard's, or the one given) if any value is not finite; multiply by `inverse_scale`.

        One pass over the tensors does both, in place.
        """
        flag = self.flag if flag is None else flag
        scale = self._one if inverse_scale is None else inverse_scale
        first = tensors[0]
        if all(t.dtype == first.dtype for t in tensors):
            torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), flag, scale)
        else:
            for tensor in tensors:
                torch._amp_foreach_non_finite_check_and_unscale_([tensor], flag, scale)


class TurnModule(nn.Module):
    """What DDP wraps: the movers' parameters, and the turn's loss as the forward pass.

    DDP then hooks every gradient, however the loss calls the networks (`forward_intermediates`,
    jvp, adapters switched on and off).
    """

    def __init__(self, movers: Sequence[Player], loss: Callable[[Batch], tuple[Terms, Carry]]) -> None:
        super().__init__()
        self.movers = nn.ModuleList(player.module for player in movers)
        self.loss = loss

    def forward(self, batch: Batch) -> tuple[Terms, Carry]:
        return self.loss(batch)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to what `Run.mixed_precision` says."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Context:
    """What the turns of a stage share."""

    def __init__(self, assembly: Assembly, proof: Proof | None) -> None:
        self.assembly, self.proof = assembly, proof
        self.method, self.run, self.world = assembly.method, assembly.run, assembly.world
        self.players, self.buffers, self.ema = assembly.players, assembly.buffers, assembly.ema
        self.guard = Guard(self.world.device)
        self.writes_state = type(self.method).after is not Method.after
        self.modes_of: TurnRunner | None = None  # whose train and eval modes the players are in

    def autocast(self) -> AbstractContextManager:
        return autocast(self.run.mixed_precision, self.world.device)

    def write(self, writes: dict[str, Tensor | tuple[Tensor, Tensor]], hold: Tensor) -> None:
        """Write what `Method.after` returned into the method's state, unless `hold` is set.

        Raises:
            SettingsError: there is no state of that name.
        """
        held = hold.bool()
        for name, value in writes.items():
            if name not in self.assembly.state:
                raise SettingsError(f"after() writes '{name}'; the method's state is {list(self.assembly.state)}")
            target = self.assembly.state[name]
            if isinstance(value, tuple):
                rows, values = value
                target[rows] = torch.where(held, target[rows], values.to(target.dtype))
            else:
                target.copy_(torch.where(held, target, value))


class TurnRunner:
    """Plays one turn."""

    def __init__(self, turn: Turn, context: Context) -> None:
        self.turn, self.context = turn, context
        self.movers = [context.players[name] for name in turn.moves]
        self.parameters = [p for player in self.movers for p in player.parameters]
        self.named = {f"{m.name}.{name}": p for m in self.movers for name, p in m.named.items()}
        still = [player for name, player in context.players.items() if name not in turn.moves]
        moving = {id(p) for p in self.parameters}
        self.flags = [(p, id(p) in moving) for player in context.players.values() for p in player.parameters]
        self.modes = [mode for player in still for mode in player.eval_modes]
        self.modes += [mode for player in self.movers for mode in player.train_modes]
        followed = {id(p) for p in context.method.product().parameters()}
        self.moves_product = any(id(p) in followed for p in self.parameters)
        self.tracks = any(next(player.module.buffers(), None) is not None for player in self.movers)
        self.scale = context.assembly.scales.get(turn.name)
        self.plays, self.skipped = 0, torch.zeros((), device=context.world.device)
        self.reseed = Reseed(context.world.device, context.run.seed, turn.name, context.world.rank)
        self.forward = self._wrap(turn.loss)

    def _wrap(self, loss: Callable[[Batch], tuple[Terms, Carry]]) -> Callable[[Batch], tuple[Terms, Carry]]:
        run, world = self.context.run, self.context.world
        if run.compile and self.turn.compile:
            loss = compiled(loss, run)
        if world.size == 1 or self.turn.combine is not None:
            return loss
        self.restrict()
        devices = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(
            TurnModule(self.movers, loss), device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def restrict(self) -> None:
        """Let exactly the movers train and receive gradients."""
        if self.context.modes_of is not self:
            for attributes, training in self.modes:
                attributes["training"] = training
            self.context.modes_of = self
        # Compared one by one, because adapters switched off and on in `prepare` turn their flags on again.
        for parameter, moves in self.flags:
            if parameter.requires_grad is not moves:
                parameter.requires_grad_(moves)

    def play(self, step: int, batches: Sequence[Batch]) -> tuple[Terms, list[Carry]]:
        """One update from all micro-batches; returns its detached terms and its carries."""
        self.restrict()
        terms, carries = self._accumulate(step, batches)
        margins = [carry.pop("skip") for carry in carries if "skip" in carry]
        gradients = [self._gradients_of(player) for player in self.movers]
        hold = self._judge(terms, gradients, margins)
        self._move(step, gradients, hold)
        self._follow(carries, hold)
        return terms, carries

    def _accumulate(self, step: int, batches: Sequence[Batch]) -> tuple[Terms, list[Carry]]:
        """Loss and backward over the micro-batches: the movers then hold their gradients, over all processes."""
        for parameter in self.parameters:
            parameter.grad = None
        context, count = self.context, len(batches)
        groups: dict[str, list[Tensor]] = {}
        seen: list[Terms] = []
        carries: list[Carry] = []
        for micro, batch in enumerate(batches):
            self.reseed(step, micro)
            with self._reduction(last=micro == count - 1):
                with context.autocast():
                    terms, carry = self.forward(batch)
                if context.proof is not None:
                    context.proof.observe(self.turn, step, terms, self.movers)
                self._backward(terms, count, groups)
            seen.append({name: term.detach() for name, term in terms.items()})
            carries.append({name: value.detach() for name, value in carry.items()})
        if self.turn.combine is not None:
            self._combine(groups)
        return tree_join(seen), carries

    def _reduction(self, last: bool) -> AbstractContextManager:
        wrapped = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if wrapped and not last else nullcontext()

    def _backward(self, terms: Terms, count: int, groups: dict[str, list[Tensor]]) -> None:
        if self.turn.combine is None:
            self._scaled(terms.values(), count).backward()
            return
        by_group: dict[str, list[Tensor]] = {}
        for name, term in terms.items():
            by_group.setdefault(name.partition("/")[0], []).append(term)
        for number, (group, members) in enumerate(by_group.items(), 1):
            gradients = torch.autograd.grad(
                self._scaled(members, count), self.parameters, retain_graph=number < len(by_group), allow_unused=True
            )
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
            if group in groups:
                torch._foreach_add_(groups[group], filled)
            else:
                groups[group] = [g.clone() for g in filled]

    def _scaled(self, terms: Sequence[Tensor], count: int) -> Tensor:
        total = reduce(torch.add, terms)
        if count > 1:
            total = total / count
        return total if self.scale is None else total.float() * self.scale.scale

    def _combine(self, groups: dict[str, list[Tensor]]) -> None:
        every = [gradient for gradients in groups.values() for gradient in gradients]
        if self.context.world.size > 1:
            _reduce_mean(every, self.context.world.size)
        # Judged before too: a `combine` that divides can hide an infinity.
        self._check_gradients(every)
        named = {group: dict(zip(self.named, gradients, strict=True)) for group, gradients in groups.items()}
        with torch.no_grad():
            combined = self.turn.combine(named)
        for name, parameter in self.named.items():
            # Fused optimisers read a gradient's memory in the parameter's layout; a compiled backward may have another.
            gradient, fits = combined[name], combined[name].stride() == parameter.stride()
            parameter.grad = gradient if fits else torch.empty_like(parameter).copy_(gradient)

    def _check_gradients(self, gradients: Sequence[Tensor]) -> None:
        if self.scale is None:
            self.context.guard.check(gradients)
        else:
            self.context.guard.check(gradients, self.scale.overflow, self.scale.scale.reciprocal())

    def _judge(self, terms: Terms, gradients: Sequence[list[Tensor]], margins: Sequence[Tensor]) -> Tensor:
        """The 0-d flag, 1 where this update must not happen; gradients lose fp16's loss scale on the way."""
        guard, world = self.context.guard, self.context.world
        every = [gradient for part in gradients for gradient in part]
        total = reduce(torch.add, terms.values())
        if self.scale is None:
            guard.check([*every, total.to(every[0].dtype)])
        else:
            guard.check([total.float()])
            if self.turn.combine is None:
                self._check_gradients(every)
            else:
                guard.check(every)
        if world.size > 1:
            dist.all_reduce(guard.flag, dist.ReduceOp.MAX)
        hold = guard.flag
        if margins:
            margin = torch.stack(list(margins)).mean().float()
            if world.size > 1:
                dist.all_reduce(margin)
            hold = torch.maximum(hold, (margin > 0).float())
        if self.scale is not None:
            hold = torch.maximum(hold, self.scale.overflow)
            self.scale.update()
            self.scale.overflow = torch.zeros_like(self.scale.overflow)
        return hold

    def _gradients_of(self, player: Player) -> list[Tensor]:
        gradients = player.gradients()
        if not gradients:
            raise NoGradient(
                f"turn '{self.turn.name}' moves player '{player.name}', but its loss sent that player no gradient: "
                f"is a tensor detached on the way, or is the player not used?"
            )
        if self.context.world.size > 1 and len(gradients) < len(player.parameters):
            unused = [name for name, p in player.named.items() if p.grad is None]
            raise NoGradient(
                f"turn '{self.turn.name}' does not use {unused[:5]} of player '{player.name}': under several "
                f"processes every trainable tensor must take part; freeze or drop them"
            )
        return gradients

    def _move(self, step: int, gradients: Sequence[list[Tensor]], hold: Tensor) -> None:
        """Clip the gradients, one list a mover, and step the optimisers, unless `hold` is set."""
        for player, part in zip(self.movers, gradients, strict=True):
            if player.settings.clip is not None:
                _clip(part, player.settings.clip)
        for player in self.movers:
            player.schedule(step)
            if player.gated:
                player.optimizer.found_inf = hold
                player.optimizer.step()
            elif not hold.item():  # deliberate sync: this optimiser knows no gate on the device
                player.optimizer.step()
        self.context.buffers.settle(hold, shared=self.context.world.size > 1 and self.tracks)

    def _follow(self, carries: Sequence[Carry], hold: Tensor) -> None:
        """What comes after an update, unless `hold` is set: state writes, the moving average, the counts."""
        context, guard = self.context, self.context.guard
        self.plays += 1
        if hold is not guard.flag:
            self.skipped.add_(hold)
        if context.writes_state:
            with torch.no_grad():
                context.write(context.method.after(self.turn.name, tree_join(carries)), hold)
        if self.moves_product and context.ema is not None:
            context.ema.update(hold)
        if context.proof is not None:
            context.proof.settled(self.turn, hold, average=self.moves_product)
        guard.refused.add_(guard.flag)


class Step:
    """The update of one method; call it with consecutive step numbers."""

    def __init__(self, context: Context, shares: Shares) -> None:
        self.context, self.shares = context, shares
        self.turns = [TurnRunner(turn, context) for turn in context.assembly.turns]
        self.draws = [self._draw(rows) for rows in shares.micro]
        self.whole = self._draw(shares.whole)
        self.reseed = Reseed(context.world.device, context.run.seed, "prepare")
        self.prepares = type(context.method).prepare is not Method.prepare
        self.played: list[tuple[int, str, Terms]] = []

    def __call__(self, step: int, raw: Sequence[Batch]) -> None:
        """Update from `raw`, one batch per micro-batch, and note the terms in `played`."""
        due = [runner for runner in self.turns if runner.turn.due(step)]
        if not due:
            return
        names = frozenset(runner.turn.name for runner in due)
        due[0].restrict()
        self.context.buffers.remember()
        batches = [self._prepare(step, batch, draw, names) for batch, draw in zip(raw, self.draws, strict=True)]
        whole: Batch | None = None
        if len(batches) > 1 and not all(runner.turn.accumulate for runner in due):
            whole = self._prepare(step, tree_join(raw), self.whole, names)
        carried: list[Carry] = [{} for _ in batches]
        for runner in due:
            terms, carries = runner.play(step, turn_inputs(runner.turn, batches, whole, carried))
            self.played.append((step, runner.turn.name, terms))
            carried = handed_on(carried, carries)

    def require_updates(self) -> None:
        """Check, once the stage is over, that the product was updated at all.

        Raises:
            NotLearning: every update of it was skipped.
        """
        moving = [runner for runner in self.turns if runner.moves_product and runner.plays]
        if moving and all(runner.skipped.item() == runner.plays for runner in moving):
            counts = {runner.turn.name: runner.plays for runner in moving}
            raise NotLearning(
                f"stage '{self.context.assembly.stage.name}' trained nothing: every update was skipped ({counts}). "
                f"Either fp16 overflowed each time (set run.mixed_precision to bf16 or no), or the turns declined"
            )

    def _draw(self, rows: Rows) -> Draw:
        context, block = self.context, self.shares.block
        return Draw(context.run.seed, 0, rows, block, context.world.device, context.assembly.noise_dtype)

    def _prepare(self, step: int, raw: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        if not self.prepares:
            return raw
        context, draw.step = self.context, step
        self.reseed(step, draw.rows[""][0])
        with torch.no_grad(), context.autocast():
            return context.method.prepare(dict(raw), draw, due)


def turn_inputs(turn: Turn, batches: Sequence[Batch], whole: Batch | None, carried: Sequence[Carry]) -> list[Batch]:
    """What a turn is played on: each micro-batch, or `whole` for a turn that does not accumulate over them."""
    if turn.accumulate or whole is None:
        return [batch | carry for batch, carry in zip(batches, carried, strict=True)]
    return [whole | tree_join(carried)]


def handed_on(carried: Sequence[Carry], carries: Sequence[Carry]) -> list[Carry]:
    """What later turns of the step receive, one carry a micro-batch, after a turn that gave `carries`."""
    if len(carries) < len(carried):
        carries = _split(carries[0], len(carried))
    return [old | new for old, new in zip(carried, carries, strict=True)]


def _split(carry: Carry, count: int) -> list[Carry]:
    parts = {name: [value] * count if value.ndim == 0 else value.chunk(count) for name, value in carry.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


def _reduce_mean(tensors: Sequence[Tensor], size: int) -> None:
    flat = torch._utils._flatten_dense_tensors(list(tensors))
    dist.all_reduce(flat)
    flat /= size
    for tensor, mean in zip(tensors, torch._utils._unflatten_dense_tensors(flat, list(tensors)), strict=True):
        tensor.copy_(mean)


def _clip(gradients: Sequence[Tensor], limit: float) -> None:
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(list(gradients), (limit / (norm + 1e-6)).clamp(max=1.0))
