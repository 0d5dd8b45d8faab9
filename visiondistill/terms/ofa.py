"""One-for-All distillation; see `losses.ofa_loss`.

Stages, heads and their initial weights as in the released code, but for three things: grids that
cannot be merged evenly are refused before the first step, a last stage smaller than 7x7 lowers the
aim of the merging (small images), and of several prefix tokens the first is classified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from visiondistill.engine.errors import SettingsError
from visiondistill.engine.method import Stream
from visiondistill.losses.ofa import ofa_loss
from visiondistill.models.network import Network, Shape
from visiondistill.teachers.base import Teacher
from visiondistill.terms.base import Needs, Term, View

STAGES = 4
ATTENTION_HEADS = 4


class OFA(Term):
    """Heads turn the student's features into logits; these and its own logits learn from the teacher's logits.

    The sum of `losses.ofa_loss` over the heads and the student's own logits. No feature of the
    teacher is read, so that the two networks may be of different kinds. All heads together are the
    player `<term>_heads`; they train in the student's turn, their gradients reach the student, and
    they are not exported. For weights of their own, take two terms: `stages: []` matches the logits
    alone, `logits: false` the heads alone. Mixed labels count as the larger of their two classes.

    The head of stage i in a network of convolutions: `4 - i` separable blocks that halve the
    resolution and double the channels, the last one up to c (at stage 4 one 1x1 convolution), then
    mean and linear layer; c is the wider of both networks' embeddings, the student's where the
    teacher has none. In a token model: patches merged 2x2 as often as their grid stays at least
    `grid` wide (14x14 becomes 7x7, 16x16 becomes 8x8; a last stage that is smaller sets the aim),
    `max(4 - i, 1)` transformer blocks as wide as the embedding, then the class token, or the mean
    where there is none, and a linear layer. Register tokens take part in the blocks.

    Args:
        stages: which of the student's four stages have a head, of 1, 2, 3 and 4; none for the logits alone.
        gamma: exponent > 0; one for all, or one for each stage and, if `logits`, a last one for the logits.
        temperature: T > 0, divides all logits. There is no factor T^2.
        nontarget_power: as of `losses.ofa_loss`.
        logits: also match the student's own logits.
        taps: the network's stage for each of `stages`, counted from 0, -1 for the last. None: the last
            four; of n blocks with maps of one shape blocks 1, 3, n-3 and n-1 (fewer than 8: every n/4).
        kind: of the student, which decides the heads; None: "tokens" for models that embed patches as
            timm's do (transformers, MLPs, Swin), "convolutions" for others.
        grid: see above.
        head: the student's classifier whose logits are its own.

    Raises:
        ValueError: nothing to match, unknown stages, or numbers that are too few, too many or outside their range.
    """

    def __init__(
        self,
        stages: Sequence[int] = (1, 2, 3, 4),
        gamma: float | Sequence[float] = 1.0,
        temperature: float = 1.0,
        nontarget_power: bool = True,
        logits: bool = True,
        taps: Sequence[int] | None = None,
        kind: Literal["convolutions", "tokens"] | None = None,
        grid: int = 7,
        head: str = "main",
    ) -> None:
        super().__init__()
        if len(set(stages)) < len(stages) or not set(stages) <= set(range(1, STAGES + 1)):
            raise ValueError(f"stages must be different numbers of 1 to {STAGES}, got {list(stages)}")
        if not stages and not logits:
            raise ValueError("there is nothing to match: name a stage, or set logits to true")
        if taps is not None and len(taps) != len(stages):
            raise ValueError(f"taps must name one stage of the network for each of stages {list(stages)}: {list(taps)}")
        if kind not in (None, "convolutions", "tokens"):
            raise ValueError(f"kind must be 'convolutions' or 'tokens', got {kind!r}")
        if not temperature > 0 or grid < 1:
            raise ValueError(f"need temperature > 0 and grid >= 1, got {temperature} and {grid}")
        self.stages, self.temperature, self.nontarget_power = tuple(stages), temperature, nontarget_power
        self.logits, self.taps, self.kind, self.grid = logits, taps, kind, grid
        self.gamma = _for_each(gamma, len(self.stages) + logits)
        # Which stages these are is settled when the student is known.
        tapped = (-1,) * len(self.stages)
        self.needs = Needs(head, label=True, soft_label=True, teacher_logits=True, student_stages=tapped)

    def settle(self, student: Network, streams: Mapping[str, Stream]) -> None:
        if self.stages:
            taps = _default_taps(student.feature_shapes(), self.stages) if self.taps is None else tuple(self.taps)
            self.needs = replace(self.needs, student_stages=taps)

    def connect(self, student: Network, teacher: Teacher | None) -> None:
        if not self.stages:
            return
        classes = teacher.num_classes if student.num_classes is None else student.num_classes
        if classes is None:
            raise SettingsError("neither network says how many classes it tells apart: give the student num_classes")
        shapes, width = student.feature_shapes(), student.embedding_size()
        tapped = {stage: shapes[tap] for stage, tap in zip(self.stages, self.needs.student_stages, strict=True)}
        if self._reads_tokens(student):
            grid = min(self.grid, *shapes[-1][1:])
            heads = {stage: _token_head(stage, shape, width, grid, classes) for stage, shape in tapped.items()}
        else:
            width = max(width, _width(teacher))
            heads = {stage: ConvolutionHead(stage, shape[0], width, classes) for stage, shape in tapped.items()}
        self.players["heads"] = nn.ModuleDict({str(stage): head for stage, head in heads.items()})
        self.players["heads"].apply(_draw_weights)

    def _reads_tokens(self, student: Network) -> bool:
        if self.kind is not None:
            return self.kind == "tokens"
        # timm's vision transformers, MLPs and Swins embed patches first; no network of convolutions does.
        return any(hasattr(child, "num_patches") for child in student.model.children())

    def forward(self, view: View) -> Tensor:
        features = zip(self.stages, view.student_features, view.student_prefixes, strict=True)
        answers = [self.players["heads"][str(stage)](feature, prefixes) for stage, feature, prefixes in features]
        answers += [view.logits] if self.logits else []
        label = view.label if view.target is None else view.target.argmax(1)
        return sum(
            ofa_loss(answer, view.teacher_logits, label, gamma, self.temperature, self.nontarget_power, "none")
            for answer, gamma in zip(answers, self.gamma, strict=True)
        )


class ConvolutionHead(nn.Module):
    """Logits of a feature map; see `OFA`.

    Args:
        stage: 1 to 4.
        channels: of the map.
        width: c.
        classes: K.
    """

    def __init__(self, stage: int, channels: int, width: int, classes: int) -> None:
        super().__init__()
        halvings = STAGES - stage
        outputs = [channels * 2**number for number in range(1, halvings)] + [width]
        inputs = [channels * 2**number for number in range(max(halvings, 1))]
        make = separable_block if halvings else _pointwise
        self.narrow = nn.Sequential(*map(make, inputs, outputs))
        self.classify = nn.Linear(width, classes)

    def forward(self, feature: Tensor, prefixes: Tensor | None) -> Tensor:
        """`[B, C, H, W]` to `[B, K]`."""
        return self.classify(self.narrow(feature).mean((-2, -1)))


class TokenHead(nn.Module):
    """Logits of a grid of tokens; see `OFA`.

    Args:
        stage: 1 to 4.
        channels: of the tokens.
        width: of the blocks.
        merges: how often patches are merged.
        classes: K.
    """

    def __init__(self, stage: int, channels: int, width: int, merges: int, classes: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        # The last merging has no activation, unless it is the first one too.
        self.merge = nn.Sequential(
            *(
                Merging(width if number else channels, width, activates=number < max(merges - 1, 1))
                for number in range(merges)
            )
        )
        self.blocks = nn.Sequential(*(Block(width, ATTENTION_HEADS) for _ in range(max(STAGES - stage, 1))))
        self.classify = nn.Linear(width, classes)

    def forward(self, feature: Tensor, prefixes: Tensor | None) -> Tensor:
        """`[B, C, H, W]` and `[B, n, C]` to `[B, K]`."""
        tokens = self.merge(feature.permute(0, 2, 3, 1)).flatten(1, 2)
        if prefixes is None:
            return self.classify(self.blocks(tokens).mean(1))
        return self.classify(self.blocks(torch.cat([prefixes, tokens], 1))[:, 0])


class Merging(nn.Module):
    """Four neighbouring tokens to one, `[B, H, W, C]` to `[B, H / 2, W / 2, width]`."""

    def __init__(self, channels: int, width: int, activates: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, width, bias=False)
        self.activation = nn.GELU() if activates else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        corners = [tokens[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.activation(self.reduction(self.norm(torch.cat(corners, -1))))


def separable_block(before: int, after: int) -> nn.Sequential:
    """Depthwise and pointwise convolutions, twice; the first pair halves the resolution, the second widens."""
    return nn.Sequential(
        nn.Conv2d(before, before, 3, stride=2, padding=1, groups=before, bias=False),
        nn.Conv2d(before, before, 1, bias=False),
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


def _pointwise(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1)


def _token_head(stage: int, shape: Shape, width: int, grid: int, classes: int) -> TokenHead:
    channels, height, breadth = shape
    merges = max(int(math.log2(min(height, breadth) / grid)), 0)
    if width % ATTENTION_HEADS:
        raise SettingsError(
            f"OFA: the heads of a token model have {ATTENTION_HEADS} attention heads, which do not divide its "
            f"embedding of {width}: choose a student whose width is a multiple of {ATTENTION_HEADS}"
        )
    if height % 2**merges or breadth % 2**merges:
        raise SettingsError(
            f"OFA: the {height}x{breadth} patches of stage {stage} cannot be merged 2x2 {merges} times down to {grid}: "
            f"give grid: {min(height, breadth)} to leave them as they are, or the student another image or patch size"
        )
    if not merges and channels != width:
        raise SettingsError(
            f"OFA: stage {stage} has tokens of {channels} and its {height}x{breadth} patches are not merged, so that "
            f"nothing brings them to the embedding's {width}: leave the stage out, or give a smaller grid than {grid}"
        )
    return TokenHead(stage, channels, width, merges, classes)


def _for_each(gamma: float | Sequence[float], count: int) -> tuple[float, ...]:
    every = tuple(gamma) if isinstance(gamma, Sequence) else (gamma,)
    if len(every) not in (1, count) or not all(0 < value < math.inf for value in every):
        raise ValueError(f"gamma must be one number > 0, or {count}: one for each head and the logits; got {gamma}")
    return every * count if len(every) == 1 else every


def _default_taps(shapes: Sequence[Shape], stages: Sequence[int]) -> tuple[int, ...]:
    count = len(shapes)
    if len(set(shapes)) > 1 or count <= STAGES:
        missing = [stage for stage in stages if stage <= STAGES - count]
        if missing:
            there = list(range(STAGES - count + 1, STAGES + 1))
            raise ValueError(
                f"the student has {count} stages, counted as the last of {STAGES}, and so none for {missing}: "
                f"choose stages from {there}"
            )
        return tuple(count - STAGES + stage - 1 for stage in stages)
    places = (2, 4, count - 2, count) if count >= 8 else [math.ceil(stage * count / 4) for stage in (1, 2, 3, 4)]
    return tuple(places[stage - 1] - 1 for stage in stages)


def _width(teacher: Teacher) -> int:
    try:
        return teacher.embedding_size()
    except TypeError:  # it has logits alone
        return 0


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
