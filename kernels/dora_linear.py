"""A linear layer with a low-rank update whose output features are multiplied by gains, in one function.

    z  = x Wᵀ + bias + s · x̂ Aᵀ Bᵀ                    `lora_linear`
    y  = g ∘ z + (1 − g) ∘ bias                       DoRA, arXiv 2402.09353, equation 5, with g = m / n

    dg = Σ dY ∘ (z − bias)       over tokens
    dZ = g ∘ dY                  then as for `lora_linear`

The norms n are constants (section 4.3) and come from `dora_norm`; whoever divides m by them gets m's gradient from g's.
Saved for backward are x once, S, and z, which dg needs: a tensor of the output's size. y could not stand in for it. Whoever
calls may write over y, as an activation in place does, and where g is 0 it tells nothing of z. Computing z once more would
be a product as large as the base's. Where g is not trained z is not saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit.kernels import lora_linear as lora
from peftkit.kernels import rescale


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`dora_linear` in plain torch."""
    return rescale.reference(lora.reference(x, weight, bias, a, b, scale, dropout, seed), gain, bias)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    *,
    seed: Tensor | None = None,
    way: str | None = None,
) -> Tensor:
    """y = gain ∘ (x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ) + bias, in the dtype of x and weight.

    gain: (out), in fp32 or wider, on the device of x; differentiable. Everything else, and what is raised, as for
    `lora_linear`. Where gain is 1 the output is that of `lora_linear` bit for bit.
    """
    if gain.shape != b.shape[:1]:
        raise ValueError(f"gain: expected {tuple(b.shape[:1])} for the b given, found {tuple(gain.shape)}")
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gain, a, b))
    if not (trains or way) or not _fits(x, weight, bias, gain, way):
        z = lora.lora_linear(x, weight, bias, a, b, scale, dropout, seed=seed, way=way)
        return rescale.rescale(z, gain, bias, own=True)
    lora.check(x, weight, bias, a, b, dropout, None, seed)
    return lora.kernel(x, None, weight, bias, gain, a, b, scale, dropout, seed, way)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor, way: str | None) -> bool:
    """Whether the kernels, whose base is frozen, can do it in one."""
    return (
        not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and gain.device == x.device
        and gain.dtype is torch.promote_types(x.dtype, torch.float32)
        and not lora.must_compose(x, weight, way)
    )
