"""The LoRA linear as autograd sees it where the torch way is called eagerly: no dispatcher between, and a kept mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.kernels import torch_way
from peftkit.kernels.rescale import gradients, scaled

Gradients = tuple[Tensor | None, ...]


def rows(x: Tensor) -> Tensor:
    """(... in) -> (tokens in), without a copy where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def shaped(out: Tensor, like: torch.Size) -> Tensor:
    """(tokens out) -> (... out), the leading sizes those of `like`; no view to autograd, so that it may be written over."""
    return out if len(like) == 2 else torch.ops.aten._unsafe_view(out, (*like[:-1], out.shape[-1]))


class LoraLinear(torch.autograd.Function):
    """The torch way for eager calls.

    Saves x where A is trained, S where B is, with dropout a byte a number of x, and z, the output before its features are
    multiplied by `gain`, where that is trained.
    """

    @staticmethod
    def forward(ctx: Any, x, y, weight, bias, gain, a, b, scale, dropout, seed):
        _, _, _, _, gain_trains, a_trains, b_trains, *_ = ctx.needs_input_grad
        flat_y = None if y is None else rows(y)
        out, s, keep, ctx.alpha = torch_way.forward(rows(x), flat_y, weight, bias, a, b, scale, dropout, seed)
        z = out if gain_trains else None
        if gain is not None:
            out = scaled(out, gain, bias, out=None if gain_trains else out)
        ctx.shape = x.shape
        s, x = s if b_trains else None, x if a_trains else None
        ctx.save_for_backward(x, z, weight, bias, gain, a, b, s, keep)
        return shaped(out, ctx.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(grad.device.type, enabled=False):  # forward ran without it
            x, z, weight, bias, gain, a, b, s, keep = ctx.saved_tensors
            x_needs, y_needs, _, _, gain_needs, a_needs, b_needs, *_ = ctx.needs_input_grad
            needs, flat = (x_needs, a_needs, b_needs), None if x is None else rows(x)
            run = again if torch.is_grad_enabled() else once
            found = run(rows(grad), flat, z, weight, bias, gain, a, b, s, keep, ctx.alpha, needs, gain_needs)
        dx, da, db, dgain = found
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, grad if y_needs else None, None, None, dgain, da, db, None, None, None


def once(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    keep: Tensor | None,
    alpha: float,
    needs: torch_way.Needs,
    gain_needs: bool,
) -> Gradients:
    """dX, dA, dB and dgain, each where it is needed, by the torch way."""
    dz, dgain = dy, None
    if gain is not None:
        dz, dgain = gradients(dy, z if gain_needs else None, gain, bias, -1, any(needs))
    if dz is None:
        return None, None, None, dgain
    return *torch_way.backward(dz, x, weight, a, b, s, keep, alpha, needs), dgain


def again(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    keep: Tensor | None,
    alpha: float,
    needs: torch_way.Needs,
    gain_needs: bool,
) -> Gradients:
    """What `once` gives, out of place, for autograd to go through: what `create_graph=True` asks for."""
    x_needs, a_needs, b_needs = needs
    if x is None and x_needs and (b_needs or gain_needs):
        raise RuntimeError("lora_linear: with `a` frozen x is not saved, so only first derivatives; use `reference`")
    low, wide_b, dgain = a.to(dy.dtype), b.to(dy.dtype), None
    mask = 1 if keep is None else keep
    dropped = None if x is None else x * mask
    if dropped is not None:
        s = F.linear(dropped, low)
    if gain_needs:
        assert z is not None and gain is not None
        part = z if bias is None else z - bias
        if x is not None and weight is not None and s is not None:
            part = F.linear(x, weight) + F.linear(s, wide_b) * alpha
        elif s is not None:  # what was saved is no function of B to autograd: this is, of the same value
            added = F.linear(s, wide_b) * alpha
            part = part - added.detach() + added
        dgain = (part * dy).to(gain.dtype).sum(0)
    if gain is not None:
        dy = (dy * gain).to(dy.dtype)
    ds = dy @ wide_b * alpha
    dx = ds @ low * mask if weight is None else dy @ weight + ds @ low * mask
    return (
        dx if x_needs else None,
        (ds.t() @ dropped).to(a.dtype) if a_needs and dropped is not None else None,
        (dy.t() @ s * alpha).to(b.dtype) if b_needs and s is not None else None,
        dgain,
    )
