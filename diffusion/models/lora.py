"""Students that are low-rank adapters on their teacher's own weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from diffusion.denoiser import Denoiser
from diffusion.generator import Generator
from diffusion.models.networks import inner_model

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of diffusers' attention layers."""


def lora(
    teacher: Generator,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: Sequence[str] = ATTENTION,
    steps: int = 1,
) -> Generator:
    """A student that shares every weight with its teacher and learns adapters of its own alone.

    It starts as the same function (the adapters' second factor is 0). The shared weights are frozen
    in the teacher too.

    Args:
        teacher: recipes give theirs.
        rank: of each adapter.
        alpha: the adapters count alpha/rank; default rank.
        target_modules: ends of the names of the layers that get one.
        steps: that the student takes.

    Raises:
        ValueError: no layer of such a name, or adapters in it already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if is_lora(teacher.denoiser):
        raise ValueError("the teacher has adapters already: give the one that they were put on")
    student = copy.deepcopy(teacher.denoiser, {id(held): held for held in teacher.denoiser.parameters()})
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(target_modules))
    try:
        inject_adapter_in_model(config, inner_model(student))
    except ValueError as error:
        raise ValueError(f"target_modules={list(target_modules)}: {error}") from error
    return teacher.student(student, steps)


def is_lora(denoiser: Denoiser) -> bool:
    """Whether adapters of peft are in it."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(part, LoraLayer) for part in denoiser.modules())


def lora_state(denoiser: Denoiser) -> dict[str, Tensor]:
    """The adapters by their layers' names, their factor alpha/rank in the second of each pair.

    Files hold no alpha in this form, and loaders then take it for equal to the rank: folded in, the
    strength is in the weights themselves.
    """
    from peft.tuners.lora import LoraLayer

    state: dict[str, Tensor] = {}
    for name, part in inner_model(denoiser).named_modules():
        if isinstance(part, LoraLayer):
            (adapter,) = part.lora_A
            state[f"{name}.lora_A.weight"] = part.lora_A[adapter].weight.detach().clone()
            state[f"{name}.lora_B.weight"] = part.lora_B[adapter].weight.detach() * part.scaling[adapter]
    return state


def merged(denoiser: Denoiser) -> Denoiser:
    """A copy with the adapters added to the weights and gone."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(denoiser)
    layers = [(name, part) for name, part in plain.named_modules() if isinstance(part, LoraLayer)]
    for name, part in layers:
        part.merge()
        owner, _, own = name.rpartition(".")
        setattr(plain.get_submodule(owner), own, part.get_base_layer())
    model = inner_model(plain)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return plain
