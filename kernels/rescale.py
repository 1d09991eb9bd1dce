"""A linear map's output with every feature rescaled, and its bias left alone.

    y  = g ∘ z + (1 − g) ∘ c          z = V x + c, so y = g ∘ V x + c
    dz = g ∘ dy                       dg = Σ dy ∘ (z − c)

g stays in fp32 whatever z is in: rounded to bf16 beside 1 it would lose every change below 0.4 %. Where g is 1 both terms
are exact, so that y is z bit for bit, which (z − c) g + c would not be. z is rounded once, and saved for backward in its
own dtype; y, which whoever calls keeps anyway, would do but for those who write over it, and where g is 0.

An evaluated batch norm of mean c, variance 1, weight g and shift c is the same function. On a CPU torch computes it in one
pass over z, and both gradients in one pass over z and dy, without widened copies of half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from peftkit.kernels.choice import why_not_triton

ROWS = 2048  # that are added up one by one


def reference(z: Tensor, gain: Tensor, bias: Tensor | None = None, axis: int = -1) -> Tensor:
    """`rescale` in plain operators: what it is tested against, and what is traced."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    gain = gain.to(dtype)
    y = z * _along(gain, axis)
    return (y if bias is None else y + _along(shift_of(gain, bias), axis)).to(z.dtype)


def shift_of(gain: Tensor, bias: Tensor) -> Tensor:
    """(1 − g) ∘ c; 0 where the bias is infinite, which z is then as well."""
    return (bias.to(gain.dtype) * (1 - gain)).nan_to_num(0.0, 0.0, 0.0)


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
    return scaled(z, gain, bias, axis, z if own else None)


def _along(t: Tensor, axis: int) -> Tensor:
    return t if axis == -1 else t.view(-1, *(1,) * (-axis - 1))


def scaled(z: Tensor, gain: Tensor, bias: Tensor | None, axis: int = -1, out: Tensor | None = None) -> Tensor:
    """`rescale` as autograd does not see it; out: z itself, where it may be written over."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    if z.dtype is dtype:
        g = gain.to(dtype)
        if bias is None:
            return torch.mul(z, _along(g, axis), out=out)
        return torch.addcmul(_along(shift_of(g, bias), axis), z, _along(g, axis), out=out)
    if (
        z.is_cuda
        and axis == -1
        and gain.dtype is dtype
        and z.is_contiguous()
        and why_not_triton(z.device, z.dtype) is None
    ):
        from peftkit.kernels.rescale_rows import rescale_rows

        flat = z.view(-1, z.shape[-1])
        return torch.ops.aten._unsafe_view(rescale_rows(flat, gain, bias, None if out is None else flat), z.shape)
    if not _in_one_pass(z, gain):
        return reference(z, gain, bias, axis)
    none, one = gain.new_zeros(gain.shape), gain.new_ones(gain.shape)
    # the shift is made here: batch norm's own, from a mean of c, rounds where g is 1
    shift = none if bias is None else shift_of(gain, bias)
    image = _channels_second(z, axis, _format(z))
    found = torch.native_batch_norm(image, gain.contiguous(), shift, none, one, False, 0.0, 0.0)[0]
    return _channels_back(found, z.shape, axis)


class _Rescale(torch.autograd.Function):
    """Saves z in its own dtype, where g is trained."""

    @staticmethod
    def forward(ctx: Any, z, gain, bias, axis):
        ctx.axis = axis
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, gain, bias)
        return scaled(z, gain, bias, axis, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, gain, bias = ctx.saved_tensors
        return *gradients(dy, z, gain, bias, ctx.axis, ctx.needs_input_grad[0]), None, None


def gradients(
    dy: Tensor, z: Tensor | None, gain: Tensor, bias: Tensor | None, axis: int, z_needs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz where it is needed, and dg: (features) where z is given; differentiable while gradients are asked for."""
    if z is not None and not torch.is_grad_enabled() and dy.dtype is z.dtype and _in_one_pass(z, gain):
        return _gradients_in_one_pass(dy, z, gain, bias, axis, z_needs)
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dz = (dy * _along(gain.to(dtype), axis)).to(dy.dtype) if z_needs else None
    if z is None:
        return dz, None
    part = z.to(dtype) if bias is None else z - _along(bias.to(dtype), axis)
    others = [i for i in range(dy.dim()) if i != dy.dim() + axis]
    products = part * dy
    return dz, (products.sum(others) if others else products).to(gain.dtype)


def _gradients_in_one_pass(
    dy: Tensor, z: Tensor, gain: Tensor, bias: Tensor | None, axis: int, z_needs: bool
) -> tuple[Tensor | None, Tensor]:
    none, one, gain = gain.new_zeros(gain.shape), gain.new_ones(gain.shape), gain.contiguous()
    c = none if bias is None else bias.to(gain.dtype).contiguous()
    layout = _format(z)
    images = _channels_second(dy, axis, layout), _channels_second(z, axis, layout)
    along = 2 if axis == -1 else 0  # tokens, or the batch
    found = []
    for dy_piece, z_piece in zip(*(t.split(_length(t, along), along) for t in images), strict=True):
        mask = [z_needs, True, False]
        found.append(
            torch.ops.aten.native_batch_norm_backward(dy_piece, z_piece, gain, c, one, c, one, False, 0.0, mask)
        )
    dgain = found[0][1] if len(found) == 1 else torch.stack([f[1] for f in found]).sum(0)
    if not z_needs:
        return None, dgain
    dz = found[0][0] if len(found) == 1 else torch.cat([f[0] for f in found], along)
    return _channels_back(dz, z.shape, axis), dgain


def _length(image: Tensor, along: int) -> int:
    """How much of an axis makes `ROWS` rows: batch norm adds them up one by one, so that long sums lose digits."""
    others = image.numel() // (image.shape[1] * image.shape[along])
    return max(1, ROWS // max(1, others))


def _in_one_pass(z: Tensor, gain: Tensor) -> bool:
    """Whether torch has batch norm for these: on a CPU, z with numbers, and gains as wide as sums."""
    return z.is_cpu and z.numel() > 0 and gain.dtype is torch.promote_types(z.dtype, torch.float32)


def _format(z: Tensor) -> torch.memory_format:
    """How z lies in memory, if it is an image."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(z.dim())
    if last is not None and not z.is_contiguous() and z.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _channels_second(t: Tensor, axis: int, layout: torch.memory_format) -> Tensor:
    """(batch features …), as batch norm has it; features that lie last are an image's channels.

    z and dy in one layout: where theirs differ, torch's gradients of batch norm can be wrong (2.13, on a CPU).
    """
    if axis == -1:
        return t.reshape(-1, t.shape[-1]).contiguous().t()[None, :, :, None]
    if t.dim() == 1 - axis:
        return t.contiguous(memory_format=layout)
    return t[None].contiguous()


def _channels_back(t: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """No view to autograd, so that it may be written over."""
    return torch.ops.aten._unsafe_view(t[0, :, :, 0].t() if axis == -1 else t, shape)
