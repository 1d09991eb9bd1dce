"""The LoRA linear as autograd sees it where the torch way is called eagerly: no dispatcher between, and a kept mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.kernels import torch_way

Gradients = tuple[Tensor | None, ...]


def rows(x: Tensor) -> Tensor:
    """(... in) -> (tokens in), without a copy where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class LoraLinear(torch.autograd.Function):
    """The torch way for eager calls. Saves x where A is trained, S where B is, and with dropout a byte a number of x."""

    @staticmethod
    def forward(ctx: Any, x, y, weight, bias, a, b, scale, dropout, seed):
        _, _, _, _, a_trains, b_trains, *_ = ctx.needs_input_grad
        flat_y = None if y is None else rows(y)
        out, s, keep, ctx.alpha = torch_way.forward(rows(x), flat_y, weight, bias, a, b, scale, dropout, seed)
        ctx.shape = x.shape
        ctx.save_for_backward(x if a_trains else None, weight, a, b, s if b_trains else None, keep)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(grad.device.type, enabled=False):  # forward ran without it
            x, weight, a, b, s, keep = ctx.saved_tensors
            x_needs, y_needs, _, _, a_needs, b_needs, *_ = ctx.needs_input_grad
            needs = x_needs, a_needs, b_needs
            flat = None if x is None else rows(x)
            if torch.is_grad_enabled():
                dx, da, db = again(rows(grad), flat, weight, a, b, s, keep, ctx.alpha, needs)
            else:
                dx, da, db = torch_way.backward(rows(grad), flat, weight, a, b, s, keep, ctx.alpha, needs)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, grad if y_needs else None, None, None, da, db, None, None, None


def again(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    keep: Tensor | None,
    alpha: float,
    needs: torch_way.Needs,
) -> Gradients:
    """The gradients out of place, for autograd to go through: what `create_graph=True` asks for."""
    x_needs, a_needs, b_needs = needs
    if x is None and x_needs and b_needs:
        raise RuntimeError("lora_linear: with `a` frozen x is not saved, so only first derivatives; use `reference`")
    low = a.to(dy.dtype)
    mask = 1 if keep is None else keep
    if x is not None:
        x = x * mask
        s = F.linear(x, low)
    ds = dy @ b.to(dy.dtype) * alpha
    dx = ds @ low * mask if weight is None else dy @ weight + ds @ low * mask
    return (
        dx if x_needs else None,
        (ds.t() @ x).to(a.dtype) if a_needs and x is not None else None,
        (dy.t() @ s * alpha).to(b.dtype) if b_needs and s is not None else None,
    )
