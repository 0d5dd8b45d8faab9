"""Adversarial losses on logits `[B]` or `[B, heads]`.

The relativistic pairing is equation 2 of Huang et al. 2024 (R3GAN, arXiv 2501.05441), whose critic is higher on
generated samples, with a generator that does not saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from diffusion.tensors import choose, lift, per_sample, reduce, same_shape

KINDS = ("softplus", "hinge", "relativistic")


def gan_generator_loss(
    fake_logits: Tensor, real_logits: Tensor | None = None, *, kind: str = "softplus", reduction: str = "mean"
) -> Tensor:
    """The generator's side, mean over batch and heads.

    Args:
        fake_logits: `[B]` or `[B, heads]`.
        real_logits: read, without gradient, by "relativistic" only, pair by pair.
        kind: "softplus" (non-saturating): softplus(-f); "hinge": -f; "relativistic" (ASD):
            softplus(-(f - r)).

    Returns:
        Scalar, ln 2 at logit 0 ("hinge" 0); `[B]` with `reduction="none"`; at least float32.

    Raises:
        ValueError: unknown kind or reduction, or "relativistic" without real_logits of equal shape.
    """
    choose("kind", kind, KINDS)
    fake = lift(fake_logits)
    if kind == "softplus":
        return reduce(per_sample(softplus(-fake)), reduction)
    if kind == "hinge":
        return reduce(per_sample(-fake), reduction)
    if real_logits is None:
        raise ValueError("kind='relativistic' needs real_logits; 'softplus' and 'hinge' do without")
    same_shape(real_logits=real_logits, fake_logits=fake_logits)
    return reduce(per_sample(softplus(lift(real_logits).detach() - fake)), reduction)


def gan_discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, *, kind: str = "softplus", reduction: str = "mean"
) -> Tensor:
    """The discriminator's side, mean over batch and heads, not halved.

    Args:
        real_logits, fake_logits: `[B]` or `[B, heads]`; their batches may differ in size with
            `reduction="mean"`, except for "relativistic", which pairs them.
        kind: "softplus": softplus(f) + softplus(-r); "hinge": relu(1 + f) + relu(1 - r);
            "relativistic": softplus(-(r - f)).

    Returns:
        Scalar, 2 ln 2 at logit 0 ("hinge" 2, "relativistic" ln 2); `[B]` with `reduction="none"`;
        at least float32.

    Raises:
        ValueError: unknown kind or reduction, or "relativistic" with logits that do not pair.
    """
    choose("kind", kind, KINDS)
    real, fake = lift(real_logits), lift(fake_logits)
    if kind == "relativistic":
        same_shape(real_logits=real_logits, fake_logits=fake_logits)
        return reduce(per_sample(softplus(fake - real)), reduction)
    on_fake, on_real = (softplus(fake), softplus(-real)) if kind == "softplus" else (relu(1 + fake), relu(1 - real))
    return reduce(per_sample(on_fake), reduction) + reduce(per_sample(on_real), reduction)


def gradient_penalty(logits: Tensor, inputs: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared norm, per sample, of the gradient of the summed logits w.r.t. the inputs; differentiable.

    R1 on real inputs, R2 on generated ones; multiply by gamma/2. Source: Mescheder et al. 2018,
    equation 9.

    Args:
        logits: computed from `inputs`, `[B]` or `[B, heads]`.
        inputs: `[B, ...]`; must require grad.

    Returns:
        Scalar, or `[B]` with `reduction="none"`; at least float32.

    Raises:
        ValueError: inputs do not require grad.
    """
    if not inputs.requires_grad:
        raise ValueError("gradient_penalty needs inputs that require grad: set it before the logits are computed")
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return reduce(lift(gradient).square().flatten(1).sum(1), reduction)
