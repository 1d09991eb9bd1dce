"""A linear map's output with every feature rescaled, and its bias left alone.

    y  = g ∘ z + (1 − g) ∘ c          z = V x + c, so y = g ∘ V x + c
    dz = g ∘ dy                       dg = Σ dy ∘ (z − c)

g stays in fp32 whatever z is in: rounded to bf16 beside 1 it would lose every change below 0.4 %. Where g is 1 both terms
are exact, so that y is z bit for bit, which (z − c) g + c would not be. z is read a piece at a time on a CPU, rounded
once, and saved for backward in its own dtype; nothing of its size is kept in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

PIECE = 2**17  # numbers of z worked on at a time on a CPU, widened to at most 1 MiB


def reference(z: Tensor, gain: Tensor, bias: Tensor | None = None, axis: int = -1) -> Tensor:
    """`rescale` in plain operators: what it is tested against, and what is traced."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    g = _along(gain.to(dtype), axis)
    y = z * g if bias is None else z * g + _along(bias.to(dtype), axis) * (1 - g)
    return y.to(z.dtype)


def rescale(z: Tensor, gain: Tensor, bias: Tensor | None = None, axis: int = -1, *, own: bool = False) -> Tensor:
    """gain ∘ z + (1 − gain) ∘ bias, in the dtype of z.

    z: the features along `axis`, which counts from the end; gain, bias: (features), gain in fp32 or wider; own: nothing
    else uses z, so that it may be overwritten where no gradient needs it. Second derivatives work.
    """
    trains = torch.is_grad_enabled() and (
        z.requires_grad or gain.requires_grad or (bias is not None and bias.requires_grad)
    )
    composed = torch.compiler.is_compiling() or maybe_current_level() is not None or z.is_meta
    if composed or (trains and bias is not None and bias.requires_grad) or gain.device != z.device:
        return reference(z, gain, bias, axis)
    if trains:
        return _Rescale.apply(z, gain, bias, axis)  # type: ignore[return-value]
    return _scaled(z, gain, bias, axis, z if own else None)


def _along(t: Tensor, axis: int) -> Tensor:
    return t if axis == -1 else t.view(-1, *(1,) * (-axis - 1))


def _scaled(z: Tensor, gain: Tensor, bias: Tensor | None, axis: int, out: Tensor | None) -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    g = _along(gain.to(dtype), axis)
    if z.dtype is dtype:
        if bias is None:
            return torch.mul(z, g, out=out)
        return torch.lerp(_along(bias.to(dtype), axis), z, g, out=out)  # exact where g is 1
    shift = None if bias is None else _along(bias.to(dtype), axis) * (1 - g)
    out = torch.empty_like(z) if out is None else out
    for piece, to in _pieces(axis, z, out):
        wide = piece.to(dtype).mul_(g)
        to.copy_(wide if shift is None else wide.add_(shift))
    return out


def _pieces(axis: int, *tensors: Tensor) -> Any:
    """The tensors in step, some rows of features at a time where those lie along the last axis of a CPU's memory."""
    first = tensors[0]
    if axis != -1 or not first.is_cpu or not all(t.is_contiguous() for t in tensors):
        return (tensors,)
    rows = max(1, PIECE // max(1, first.shape[-1]))
    return zip(*(t.view(-1, t.shape[-1]).split(rows) for t in tensors), strict=True)


class _Rescale(torch.autograd.Function):
    """Saves z in its own dtype, where g is trained."""

    @staticmethod
    def forward(ctx: Any, z, gain, bias, axis):
        ctx.axis = axis
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, gain, bias)
        return _scaled(z, gain, bias, axis, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, gain, bias = ctx.saved_tensors
        run = _gradients if torch.is_grad_enabled() else _gradients_in_pieces
        dz, dgain = run(dy, z, gain, bias, ctx.axis, ctx.needs_input_grad[0])
        return dz, dgain, None, None


def _gradients(
    dy: Tensor, z: Tensor | None, gain: Tensor, bias: Tensor | None, axis: int, z_needs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Out of place, for autograd to go through: what `create_graph=True` asks for."""
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dz = (dy * _along(gain.to(dtype), axis)).to(dy.dtype) if z_needs else None
    if z is None:
        return dz, None
    part = z.to(dtype) if bias is None else z - _along(bias.to(dtype), axis)
    return dz, _summed(part * dy, axis).to(gain.dtype)


def _gradients_in_pieces(
    dy: Tensor, z: Tensor | None, gain: Tensor, bias: Tensor | None, axis: int, z_needs: bool
) -> tuple[Tensor | None, Tensor | None]:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    g = _along(gain.to(dtype), axis)
    c = None if bias is None else _along(bias.to(dtype), axis)
    dz = torch.empty_like(dy)  # also where products are made on the way to dg
    dgain = None if z is None else g.new_zeros(gain.shape)
    for dy_piece, z_piece, dz_piece in _pieces(axis, dy, dy if z is None else z, dz):
        if dy.dtype is dtype:
            if dgain is not None:
                torch.mul(z_piece if c is None else torch.sub(z_piece, c, out=dz_piece), dy_piece, out=dz_piece)
                dgain += _summed(dz_piece, axis)
            if z_needs:
                torch.mul(dy_piece, g, out=dz_piece)
            continue
        wide = dy_piece.to(dtype)
        if dgain is not None:
            part = z_piece.to(dtype)
            dgain += _summed((part if c is None else part.sub_(c)).mul_(wide), axis)
        if z_needs:
            dz_piece.copy_(wide.mul_(g))
    return dz if z_needs else None, None if dgain is None else dgain.to(gain.dtype)


def _summed(t: Tensor, axis: int) -> Tensor:
    """Over all axes but `axis`."""
    if axis == -1 and t.is_cpu and t.dim() == 2:
        return (t.new_ones(1, len(t)) @ t)[0]  # on a CPU half the time of `sum`
    others = [i for i in range(t.dim()) if i != t.dim() + axis]
    return t.sum(others) if others else t
