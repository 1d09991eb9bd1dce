"""The LoRA linear as autograd, `torch.compile`, autocast and checkpointing see it: one operator, and one for backward.

    peftkit::lora_linear(x, y?, weight?, bias?, gain?, a, b, scale, dropout, seed?, way) -> (out, S, z)
    peftkit::lora_linear_backward(dy, x?, z?, weight?, bias?, gain?, a, b, S?, scale, dropout, seed?, way, needs)
        -> (dX, dA, dB, dgain)

weight is None where the base's output y was made in another way. gain multiplies the features of z, but not the bias
(`dora_linear`); without one z is the output, and what is returned for it is empty. way is "" for what `choice` says. A mask
belongs to its seed, (1) in int64 on the device of x, so that an operator run twice draws the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftkit.kernels import choice, torch_way
from peftkit.kernels.lora_autograd import Gradients, again, once, rows, shaped
from peftkit.kernels.philox import keep_mask, kept
from peftkit.kernels.rescale import scaled

_library = torch.library.Library("peftkit", "DEF")
_library.define(
    "lora_linear(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor? gain, Tensor a, Tensor b, float scale, "
    "float dropout, Tensor? seed, str way) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? z, Tensor? weight, Tensor? bias, Tensor? gain, Tensor a, "
    "Tensor b, Tensor? s, float scale, float dropout, Tensor? seed, str way, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _way(way: str, x: Tensor, a: Tensor, b: Tensor, gain: Tensor | None, dropout: float) -> str:
    (r, fan_in), fan_out = a.shape, b.shape[0]
    if way:
        return choice.checked(way, x.device, x.dtype, r)
    tokens = x.numel() // max(1, x.shape[-1])
    return choice.way(x.device, x.dtype, tokens, fan_in, fan_out, r, dropout, gain is not None)


def _forward(x, y, weight, bias, gain, a, b, scale, dropout, seed, way):
    way = _way(way, x, a, b, gain, dropout)
    flat_y = None if y is None else rows(y)
    if way == "torch":
        z, s, _, _ = torch_way.forward(rows(x), flat_y, weight, bias, a, b, scale, dropout, seed)
        out = z if gain is None else scaled(z, gain, bias)
    else:
        from peftkit.kernels import triton_ways

        out, s, z = triton_ways.forward(way, rows(x), flat_y, weight, bias, gain, a, b, scale, dropout, seed)
    return shaped(out, x.shape), s, out.new_empty(0) if gain is None else z


def _backward(dy, x, z, weight, bias, gain, a, b, s, scale, dropout, seed, way, needs):
    way = _way(way, dy, a, b, gain, dropout)
    flat, flat_x, (*narrow, gain_needs) = rows(dy), None if x is None else rows(x), needs
    of_pair = tuple(narrow)
    if way == "torch":
        keep = None if seed is None or not dropout else keep_mask(seed, len(flat), a.shape[1], dropout)
        alpha = scale / kept(dropout)
        found = once(flat, flat_x, z, weight, bias, gain, a, b, s, keep, alpha, of_pair, gain_needs)
    else:
        from peftkit.kernels import triton_ways

        gained = None if gain is None else (z if gain_needs else None, gain, bias)
        found = triton_ways.backward(way, flat, flat_x, weight, gained, a, b, s, scale, dropout, seed, of_pair)
    dx, da, db, dgain = found
    dx = None if dx is None else dx.reshape(*dy.shape[:-1], a.shape[1])
    return tuple(dy.new_empty(0) if t is None else t.contiguous() for t in (dx, da, db, dgain))


def _forward_fake(x, y, weight, bias, gain, a, b, scale, dropout, seed, way):
    tokens = math.prod(x.shape[:-1])
    z = x.new_empty(0) if gain is None else x.new_empty(tokens, b.shape[0])
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(tokens, a.shape[0]), z


def _backward_fake(dy, x, z, weight, bias, gain, a, b, s, scale, dropout, seed, way, needs):
    like = (dy.new_empty(*dy.shape[:-1], a.shape[1]), a.new_empty(a.shape), b.new_empty(b.shape), gain)
    empty = dy.new_empty(0)
    return tuple(t.new_empty(t.shape) if needed else empty for t, needed in zip(like, needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, gain, a, b, scale, dropout, seed, way = inputs
    _, _, _, _, gain_trains, a_trains, b_trains, *_ = ctx.needs_input_grad
    _, s, z = output
    ctx.mark_non_differentiable(s, z)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.dropout, ctx.way = scale, dropout, way
    x, z, s = x if a_trains else None, z if gain_trains else None, s if b_trains else None
    ctx.save_for_backward(x, z, weight, bias, gain, a, b, s, seed)


def _gradients(ctx: Any, grad: Tensor, _of_s: Tensor | None, _of_z: Tensor | None) -> Gradients:
    x, z, weight, bias, gain, a, b, s, seed = ctx.saved_tensors
    x_needs, y_needs, _, _, gain_needs, a_needs, b_needs, *_ = ctx.needs_input_grad
    needs = x_needs, a_needs, b_needs
    with torch.autocast(grad.device.type, enabled=False):
        if torch.is_grad_enabled():
            flat, keep = rows(grad), None
            if ctx.dropout:
                keep = keep_mask(seed, len(flat), a.shape[1], ctx.dropout)
            alpha, flat_x = ctx.scale / kept(ctx.dropout), None if x is None else rows(x)
            dx, da, db, dgain = again(flat, flat_x, z, weight, bias, gain, a, b, s, keep, alpha, needs, gain_needs)
            dx = None if dx is None else dx.view(*grad.shape[:-1], a.shape[1])
        else:
            settings = ctx.scale, ctx.dropout, seed, ctx.way, (*needs, gain_needs)
            found = BACKWARD(grad, x, z, weight, bias, gain, a, b, s, *settings)
            dx, da, db, dgain = (t if needed else None for t, needed in zip(found, settings[-1], strict=True))
    return dx, grad if y_needs else None, None, None, dgain, da, db, None, None, None, None


def _autocast(x, y, weight, bias, gain, a, b, scale, dropout, seed, way):
    """The base as autocast would compute it; the pair may stay wide, since the operator rounds it."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind)
    base = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in (x, y, weight, bias)]
    with torch.autocast(kind, enabled=False):
        return FORWARD(*base, gain, a, b, scale, dropout, seed, way)


_library.impl("lora_linear", _forward, "CompositeExplicitAutograd")
_library.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("peftkit::lora_linear", _forward_fake, lib=_library)
torch.library.register_fake("peftkit::lora_linear_backward", _backward_fake, lib=_library)
torch.library.register_autograd("peftkit::lora_linear", _gradients, setup_context=_setup, lib=_library)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("lora_linear", _autocast, _key)

FORWARD = torch.ops.peftkit.lora_linear.default
BACKWARD = torch.ops.peftkit.lora_linear_backward.default


@register_flop_formula(torch.ops.peftkit.lora_linear)
def _forward_flops(x, y, weight, bias, gain, a, b, *_: Any, out_shape: Any = None) -> int:
    """2 · tokens · (in · out + r · (in + out)), as torch's counter counts products: no sums, no scaling."""
    tokens, (r, fan_in), fan_out = math.prod(x[:-1]), a, b[0]
    base = 0 if weight is None else fan_in * fan_out
    return 2 * tokens * (base + r * (fan_in + fan_out))


@register_flop_formula(torch.ops.peftkit.lora_linear_backward)
def _backward_flops(
    dy, x, z, weight, bias, gain, a, b, s, scale, dropout, seed, way, needs, out_shape: Any = None
) -> int:
    """dX = dY W + dS A, dS = dY B, dA = dSᵀ x, dB = dYᵀ S: each product that is needed."""
    x_needs, a_needs, b_needs, _ = needs
    tokens, (r, fan_in), fan_out = math.prod(dy[:-1]), a, b[0]
    base = fan_in * fan_out if x_needs and weight is not None else 0
    narrow = x_needs * fan_in + (x_needs or a_needs) * fan_out + a_needs * fan_in + b_needs * fan_out
    return 2 * tokens * (base + r * narrow)
