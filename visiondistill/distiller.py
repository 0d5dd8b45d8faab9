"""Knowledge distillation as a composition of five choices.

    terms x weighting x heads x augmentor x teacher  ->  one student turn, plus the turns that parts bring

The `Distiller` asks each part what it needs and what it brings, and puts that together; it knows
no part by name. A published method is a choice of parts, written as a recipe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
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

Answers = dict[str, Any]  # "logits", "features", "embedding" ... of one side; the student's logits by head
Values = tuple[dict[str, Tensor], View, Carry]  # the terms' values, the weighting's view, what `after` receives

STUDENT, TRAIN = "student", "train"
AXES = ("augmentor", "teacher", "heads", "weighting")


class StudentSide(nn.Module):
    """The student's turn before weighting, as a function of its players: for `torch.func.functional_call`.

    Parameters are named `players.<player>.<parameter>`; calling it with a prepared batch gives
    `{term: [B] or scalar}` and the weighting's view.
    """

    def __init__(self, players: Mapping[str, nn.Module], values: Callable[[Batch], Values]) -> None:
        super().__init__()
        self.players = nn.ModuleDict(players)
        self.values = values

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], View]:
        values, view, _ = self.values(batch)
        return values, view


class Distiller(Method):
    """Trains a student on what its terms match.

    Args:
        teacher: the source of targets: a network (frozen) or a `Teacher`; None where no term reads
            one. In a recipe's later stages it may be left out: it is then what the stage before made.
        student: a `Network`, or any classifier of pixels in [0, 1]. Player "student" and, unless the
            heads say otherwise, the product.
        terms: what is matched, by name; None takes one away (in a recipe, one of its base).
        streams: data; "train" gives the student's batches. Of others only those that a part reads are opened.
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
        terms: Mapping[str, Term | None],
        streams: Mapping[str, Stream],
        weighting: Weighting | None = None,
        heads: Heads | None = None,
        augmentor: Part | None = None,
    ) -> None:
        network, source = as_network(student), None if teacher is None else as_teacher(teacher)
        weighting, heads = weighting or Fixed(), heads or SingleHead()
        _check_networks(network, source)
        active = _active(terms, weighting)
        # The order of `prepare`: images first, then their targets, then whatever reads both.
        given = {"augmentor": augmentor, "teacher": source, "heads": heads, **active, "weighting": weighting}
        parts: dict[str, Part] = {name: part for name, part in given.items() if part is not None}
        streams = _read(streams, parts)
        labelled = getattr(streams[TRAIN], "labelled_fraction", 1.0)
        mixed = bool(getattr(augmentor, "soft_labels", False))
        for name, part in parts.items():
            _settle(name, part, network, streams)
        for name, term in active.items():
            _check_term(name, term.needs, heads, weighting, labelled, mixed)
        _check_heads(heads, active)
        readers = active | {name: part for name, part in parts.items() if part.needs is not None}
        needs = {name: _resolved(name, reader.needs, network, source) for name, reader in readers.items()}
        for name, part in parts.items():
            if name != "teacher":
                part.connect(network, source)
        _check_learners(source, active)
        if source is not None and not _asks_teacher(parts, needs):
            warnings.warn("a teacher is given, but no term with a weight reads it: it is left out", stacklevel=2)
            del parts["teacher"]
        elif source is not None:
            _check_views(augmentor, source)
            source.stages = _stages(need.teacher_stages for need in needs.values())
            source.embedding = any(need.teacher_embedding for need in needs.values())

        super().__init__(
            _united([{STUDENT: network}, _networks(parts, "players")]),
            _networks(parts, "frozen"),
            _united([streams, *(part.streams for part in parts.values())]),
        )
        self.parts = nn.ModuleDict(parts)
        self.terms = tuple(active)
        self.needs, self.labelled_fraction, self.mixed = needs, labelled, mixed
        self.student_stages = _stages(need.student_stages for need in needs.values())
        self.student_embedding = any(need.student_embedding for need in needs.values())
        self.learning_teacher = source is not None and source.online
        self._prepares = [part for part in parts.values() if type(part).prepare is not Part.prepare]
        side = StudentSide({name: self.players[name] for name in self._moved_by_student()}, self.values)
        for part in parts.values():
            part.bind(side)

    def turns(self) -> tuple[Turn, ...]:
        """The student's turn, then those of the parts."""
        # A term between rows must see them all, so that the batch cannot be split.
        splits = all(needs.per_sample for needs in self.needs.values())
        combine = self.parts["weighting"].combine
        turn = Turn(STUDENT, self.student_loss, self._moved_by_student(), combine=combine, accumulate=splits)
        return (turn, *self._brought())

    def _brought(self) -> list[Turn]:
        return [self._renamed(name, turn) for name, part in self.parts.items() for turn in part.turns()]

    def _moved_by_student(self) -> tuple[str, ...]:
        elsewhere = {player for turn in self._brought() for player in turn.moves} - {STUDENT}
        return tuple(player for player in self.players if player not in elsewhere)

    def setup(self, streams: dict[str, Stream]) -> None:
        for part in self.parts.values():
            part.setup(streams)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        for part in self._prepares:
            batch = part.prepare(batch, draw, due)
        return batch

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        """The weighted terms on one prepared batch."""
        values, view, carry = self.values(batch)
        return self.parts["weighting"](values, view), carry

    def values(self, batch: Batch) -> Values:
        """The terms' values on one prepared batch, the weighting's view, and what `after` receives."""
        sides = self._sides(batch)
        values, carry = {}, {}
        for name, needs in self.needs.items():
            view = self._view(needs, *sides, batch)
            if name in self.terms:
                values[name] = self._over_labelled(needs, self.parts[name](view), batch)
                noted = view.carry
            else:
                noted = self.parts[name].observe(view)
            carry |= {f"{name}.{entry}": tensor for entry, tensor in noted.items()}
        return values, self._view(self.needs.get("weighting", Needs()), *sides, batch), carry

    def _sides(self, batch: Batch) -> tuple[Answers, Answers]:
        """What student and teacher answer to the batch."""
        logits, outputs = self.parts["heads"](
            self.players[STUDENT], batch[TRAIN]["image"], self.student_stages, self.student_embedding
        )
        ours = {"logits": logits, "features": outputs.features, "embedding": outputs.embedding}
        ours["prefixes"] = outputs.prefixes or {}
        if self.learning_teacher:
            return ours, self.parts["teacher"].targets(batch[TRAIN])
        return ours, batch.get("teacher", {})

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
        return self.parts["heads"].product(self.players[STUDENT])

    def _view(self, needs: Needs, ours: Answers, theirs: Answers, batch: Batch) -> View:
        learner, taught = ours["logits"][needs.head], theirs.get("logits") if needs.teacher_logits else None
        if needs.peer:
            learner, taught = taught, learner
        label = batch[TRAIN]["label"] if needs.label and not self.mixed else None
        if label is not None and self.labelled_fraction < 1:
            label = label.clamp(min=0)
        # An online teacher answers with gradients; what teaches has none.
        return View(
            logits=learner,
            batch=batch,
            label=label,
            target=batch[TRAIN]["target"] if needs.label and self.mixed else None,
            teacher_logits=None if taught is None else taught.detach(),
            student_features=tuple(ours["features"][stage] for stage in needs.student_stages),
            teacher_features=tuple(theirs["features"][stage].detach() for stage in needs.teacher_stages),
            student_prefixes=tuple(ours["prefixes"].get(stage) for stage in needs.student_stages),
            student_embedding=ours["embedding"] if needs.student_embedding else None,
            teacher_embedding=theirs["embedding"].detach() if needs.teacher_embedding else None,
        )

    def _over_labelled(self, needs: Needs, value: Tensor, batch: Batch) -> Tensor:
        """Rows without a label count 0, the others so much more that the mean is over labelled rows.

        They are divided by the stream's share of labels, not by the count in this batch: counts differ
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
    """The parts' networks of a kind, "players" or "frozen", under their names in the method."""
    named = [{_join(name, own): net for own, net in getattr(part, kind).items()} for name, part in parts.items()]
    return _united(named)


def _united(dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    everything: dict[str, Any] = {}
    for each in dicts:
        twice = sorted(set(each) & set(everything))
        if twice:
            raise SettingsError(f"two parts bring {twice}: rename a term")
        everything |= each
    return everything


def _read(streams: Mapping[str, Stream], parts: Mapping[str, Part]) -> dict[str, Stream]:
    """The streams that somebody reads."""
    read = dict.fromkeys((TRAIN, *(name for part in parts.values() for name in part.reads)))
    missing = [name for name in read if name not in streams]
    if missing:
        raise SettingsError(f"streams must have {missing}, got {sorted(streams)}")
    return {name: streams[name] for name in read}


def _stages(asked: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({stage for stages in asked for stage in stages}))


def _reads_teacher(needs: Needs) -> bool:
    return needs.teacher_logits or bool(needs.teacher_stages) or needs.teacher_embedding


def _asks_teacher(parts: Mapping[str, Part], needs: Mapping[str, Needs]) -> bool:
    """Whether the teacher is read at all: in the student's turn, or by a part in a turn of its own."""
    return any(part.asks_teacher for part in parts.values()) or any(map(_reads_teacher, needs.values()))


def _active(terms: Mapping[str, Term | None], weighting: Weighting) -> dict[str, Term]:
    terms = {name: term for name, term in terms.items() if term is not None}
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
    theirs = {id(p) for net in (teacher.frozen | teacher.players).values() for p in net.parameters()}
    if any(id(p) in theirs for p in student.parameters()):
        raise SettingsError("student and teacher share parameters: they must be two networks")
    if None not in (student.num_classes, teacher.num_classes) and student.num_classes != teacher.num_classes:
        raise SettingsError(f"the student tells {student.num_classes} classes apart, the teacher {teacher.num_classes}")


def _check_term(name: str, needs: Needs, heads: Heads, weighting: Weighting, labelled: float, mixed: bool) -> None:
    if needs.head not in heads.names:
        raise SettingsError(f"term '{name}' reads the head '{needs.head}', but there are only {list(heads.names)}")
    if weighting.by_row(name) and not needs.per_sample:
        raise SettingsError(
            f"{type(weighting).__name__} weights each image, but term '{name}' has one value for the whole batch"
        )
    if mixed and needs.label and not needs.soft_label:
        raise SettingsError(f"term '{name}' needs one label per image, but the augmentor mixes images and their labels")
    if mixed and needs.label and labelled < 1:
        raise SettingsError(
            f"term '{name}' reads labels and the augmentor mixes them, but only {labelled:.1%} of the images have one"
        )
    if needs.label and not labelled:
        raise SettingsError(f"term '{name}' reads labels, but no training image has one: leave it out ({name}: null)")
    if needs.label and not needs.per_sample and labelled < 1:
        raise SettingsError(f"term '{name}' needs the label of every image, but only {labelled:.1%} of them have one")


def _check_views(augmentor: Part | None, source: Teacher) -> None:
    if augmentor is None or source.replays is None:
        return
    who, whom = type(augmentor).__name__, type(source).__name__
    unknown = ["views of which it says nothing"] if augmentor.views is None else augmentor.views - source.replays
    if unknown:
        raise SettingsError(
            f"'augmentor': {who} makes {', '.join(sorted(unknown))}, and {whom} has answers to no changed images but "
            f"{', '.join(sorted(source.replays)) or 'none'}: leave that out, or take the network itself as teacher"
        )


def _check_heads(heads: Heads, active: Mapping[str, Term]) -> None:
    untaught = sorted(set(heads.names) - {term.needs.head for term in active.values()})
    if untaught:
        raise SettingsError(
            f"{type(heads).__name__} has the heads {untaught}, which no term with a weight reads: give a term "
            f"head: {untaught[0]}, or choose other heads"
        )


def _check_learners(source: Teacher | None, active: Mapping[str, Term]) -> None:
    if source is not None and source.online and not any(term.needs.peer for term in active.values()):
        raise SettingsError(
            f"{type(source).__name__} learns with the student, but no term with a weight teaches it: give terms.Peer "
            f"(see the recipe dml), or a teacher that is done learning"
        )


def _settle(name: str, part: Part, student: Network, streams: Mapping[str, Stream]) -> None:
    try:
        part.settle(student, streams)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"'{name}': {error}") from error


def _resolved(name: str, needs: Needs, student: Network, teacher: Teacher | None) -> Needs:
    """`needs` with stages counted from 0, once it is clear that both networks can give them."""
    if _reads_teacher(needs) and teacher is None:
        raise SettingsError(f"term '{name}' reads a teacher, but there is none")
    try:
        ours = tuple(student.stage_index(stage) for stage in needs.student_stages)
        theirs = tuple(teacher.stage_index(stage) for stage in needs.teacher_stages)
        # Asked for here, so that a network without embedding is refused under the term's name.
        if needs.student_embedding:
            student.embedding_size()
        if needs.teacher_embedding:
            teacher.embedding_size()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"term '{name}': {error}") from error
    return replace(needs, student_stages=ours, teacher_stages=theirs)
