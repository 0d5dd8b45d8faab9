"""Knowledge distillation as a composition of five choices.

    terms x weighting x heads x augmentor x teacher  ->  one student turn, plus the turns that parts bring

The `Distiller` asks each part what it needs and what it brings, and puts that together; it knows
no part by name. A published method is a choice of parts, written as a recipe.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Batch, Carry, Method, Stream, Terms, Turn
from visiondistill.engine.rng import Draw
from visiondistill.heads import Heads, SingleHead
from visiondistill.models import Network, as_network
from visiondistill.parts import Part
from visiondistill.teachers import Teacher, as_teacher
from visiondistill.terms import Needs, Term, View
from visiondistill.weighting import Fixed, Weighting

STUDENT, TRAIN = "student", "train"
AXES = ("augmentor", "teacher", "heads", "weighting")


class Distiller(Method):
    """Trains a student on what its terms match.

    Args:
        teacher: the source of targets: a network (frozen) or a `Teacher`; None where no term reads
            one. In a recipe's later stages it may be left out: it is then what the stage before made.
        student: a `Network`, or any classifier of pixels in [0, 1]. Player "student" and product.
        terms: what is matched, by name.
        streams: data; "train" gives the student's batches.
        weighting: how the terms are fused; by default their plain sum.
        heads: the student's classifiers in training; by default its own alone.
        augmentor: a part whose `prepare` replaces the images of "train".

    Raises:
        SettingsError: the parts do not fit together; the message names the part.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        student: nn.Module,
        terms: Mapping[str, Term],
        streams: Mapping[str, Stream],
        weighting: Weighting | None = None,
        heads: Heads | None = None,
        augmentor: Part | None = None,
    ) -> None:
        network, source = as_network(student), None if teacher is None else as_teacher(teacher)
        weighting, heads = weighting or Fixed(), heads or SingleHead()
        _check_networks(network, source)
        if TRAIN not in streams:
            raise SettingsError(f"streams must have '{TRAIN}', got {sorted(streams)}")
        active = _active(terms, weighting)
        labelled = getattr(streams[TRAIN], "labelled_fraction", 1.0)
        mixed = bool(getattr(augmentor, "soft_labels", False))
        for name, term in active.items():
            _check_term(name, term.needs, heads, weighting, labelled, mixed)
        needs = {name: _resolved(name, term.needs, network, source) for name, term in active.items()}

        heads.connect(network)
        for term in active.values():
            term.connect(network, source)
        if source is not None and not any(map(_reads_teacher, needs.values())):
            warnings.warn("a teacher is given, but no term with a weight reads it: it is left out", stacklevel=2)
            source = None
        elif source is not None:
            source.stages = _stages(need.teacher_stage for need in needs.values())
        # The order of `prepare`: images first, then their targets, then whatever reads both.
        parts = {"augmentor": augmentor, "teacher": source, "heads": heads, **active, "weighting": weighting}
        parts = {name: part for name, part in parts.items() if part is not None}

        super().__init__(
            _united([{STUDENT: network}, _networks(parts, "players")]),
            _networks(parts, "frozen"),
            _united([streams, *(part.streams for part in parts.values())]),
        )
        self.parts = nn.ModuleDict(parts)
        self.needs, self.labelled_fraction, self.mixed = needs, labelled, mixed
        self.student_stages = _stages(need.student_stage for need in needs.values())
        self._prepares = [part for part in parts.values() if type(part).prepare is not Part.prepare]

    def turns(self) -> tuple[Turn, ...]:
        """The student's turn, then those of the parts."""
        brought = [self._renamed(name, turn) for name, part in self.parts.items() for turn in part.turns()]
        elsewhere = {player for turn in brought for player in turn.moves} - {STUDENT}
        moves = tuple(player for player in self.players if player not in elsewhere)
        # A term between rows must see them all, so that the batch cannot be split.
        splits = all(needs.per_sample for needs in self.needs.values())
        return (Turn(STUDENT, self.student_loss, moves=moves, accumulate=splits), *brought)

    def setup(self, streams: dict[str, Stream]) -> None:
        for part in self.parts.values():
            part.setup(streams)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        for part in self._prepares:
            batch = part.prepare(batch, draw, due)
        return batch

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        """The weighted terms on one prepared batch."""
        logits, features = self.parts["heads"](self.players[STUDENT], batch[TRAIN]["image"], self.student_stages)
        values, carry = {}, {}
        for name, needs in self.needs.items():
            view = self._view(needs, logits, features, batch)
            values[name] = self._over_labelled(needs, self.parts[name](view), batch)
            carry |= {f"{name}.{entry}": tensor for entry, tensor in view.carry.items()}
        return self.parts["weighting"](values, batch), carry

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        writes = {}
        for name, part in self.parts.items():
            own = {
                entry.removeprefix(f"{name}."): tensor
                for entry, tensor in carry.items()
                if entry.startswith(f"{name}.")
            }
            writes |= {f"parts.{name}.{state}": value for state, value in part.after(turn, own).items()}
        return writes

    def product(self) -> nn.Module:
        return self.players[STUDENT]

    def _view(self, needs: Needs, logits: dict[str, Tensor], features: dict[int, Tensor], batch: Batch) -> View:
        label = batch[TRAIN]["label"] if needs.label and not self.mixed else None
        if label is not None and self.labelled_fraction < 1:
            label = label.clamp(min=0)
        targets: dict[str, Any] = batch.get("teacher", {})
        return View(
            logits=logits[needs.head],
            label=label,
            teacher_logits=targets["logits"] if needs.teacher_logits else None,
            student_feature=None if needs.student_stage is None else features[needs.student_stage],
            teacher_feature=None if needs.teacher_stage is None else targets["features"][needs.teacher_stage],
            batch=batch,
            target=batch[TRAIN]["target"] if needs.label and self.mixed else None,
        )

    def _over_labelled(self, needs: Needs, value: Tensor, batch: Batch) -> Tensor:
        """Rows without a label count nothing, the others so much more that means are over labelled rows.

        The divisor is the stream's share of labels, not the count in this batch: counts differ
        between micro-batches and processes, and a mean of their means would weight images unequally.
        """
        if not needs.label or self.labelled_fraction == 1:
            return value
        return torch.where(batch[TRAIN]["label"] >= 0, value, 0.0) / self.labelled_fraction

    def _renamed(self, part: str, turn: Turn) -> Turn:
        own = self.parts[part].players
        return replace(turn, moves=tuple(_join(part, name) if name in own else name for name in turn.moves))


def _join(part: str, name: str) -> str:
    return f"{part}_{name}" if name else part


def _networks(parts: Mapping[str, Part], kind: str) -> dict[str, nn.Module]:
    """The parts' "players" or "frozen" networks under their names in the method."""
    return _united([{_join(part, name): net for name, net in getattr(m, kind).items()} for part, m in parts.items()])


def _united(dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    everything: dict[str, Any] = {}
    for each in dicts:
        twice = sorted(set(each) & set(everything))
        if twice:
            raise SettingsError(f"two parts bring {twice}: rename a term")
        everything |= each
    return everything


def _stages(stages: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(sorted({stage for stage in stages if stage is not None}))


def _reads_teacher(needs: Needs) -> bool:
    return needs.teacher_logits or needs.teacher_stage is not None


def _active(terms: Mapping[str, Term], weighting: Weighting) -> dict[str, Term]:
    taken = sorted(set(terms) & set(AXES))
    if taken:
        raise SettingsError(f"terms cannot be called {taken}: choose other names")
    active = {name: terms[name] for name in weighting.active(list(terms))}
    if not active:
        raise SettingsError(f"nothing to train on: no term has a weight, of {sorted(terms)}")
    return active


def _check_networks(student: Network, teacher: Teacher | None) -> None:
    if teacher is None:
        return
    frozen = {id(p) for net in teacher.frozen.values() for p in net.parameters()}
    if any(id(p) in frozen for p in student.parameters()):
        raise SettingsError("student and teacher share parameters, which would be trained and frozen at once")
    if None not in (student.num_classes, teacher.num_classes) and student.num_classes != teacher.num_classes:
        raise SettingsError(f"the student tells {student.num_classes} classes apart, the teacher {teacher.num_classes}")


def _check_term(name: str, needs: Needs, heads: Heads, weighting: Weighting, labelled: float, mixed: bool) -> None:
    if needs.head not in heads.names:
        raise SettingsError(f"term '{name}' reads the head '{needs.head}', but there are only {list(heads.names)}")
    if weighting.per_sample and not needs.per_sample:
        raise SettingsError(
            f"{type(weighting).__name__} weights each image, but term '{name}' has one value for the whole batch"
        )
    if mixed and needs.label and not needs.soft_label:
        raise SettingsError(f"term '{name}' needs one label per image, but the augmentor mixes images and their labels")
    if mixed and needs.label and labelled < 1:
        raise SettingsError(
            f"term '{name}' reads labels and the augmentor mixes them, but only {labelled:.1%} of the images have one"
        )
    if needs.label and not needs.per_sample and labelled < 1:
        raise SettingsError(f"term '{name}' needs the label of every image, but only {labelled:.1%} of them have one")


def _resolved(name: str, needs: Needs, student: Network, teacher: Teacher | None) -> Needs:
    """`needs` with stages counted from 0, once it is clear that both networks can give them."""
    if _reads_teacher(needs) and teacher is None:
        raise SettingsError(f"term '{name}' reads a teacher, but there is none")
    try:
        ours = None if needs.student_stage is None else student.stage_index(needs.student_stage)
        theirs = None if needs.teacher_stage is None else teacher.stage_index(needs.teacher_stage)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"term '{name}': {error}") from error
    return replace(needs, student_stage=ours, teacher_stage=theirs)
