"""Other ways to compute a LoRA linear, in plain torch: functions of (x, weight, bias, a, b, scale, dropout).

Two follow another project's order of operations, written anew: what is compared is the order, in the library's own products,
and not that project's code. x is (tokens in); weight and bias are frozen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_PEFT = importlib.util.find_spec("peft") is not None


def base(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """The frozen Linear alone, whose backward is dX: what every overhead is over."""
    return F.linear(x, weight, bias)


def peft_layer(
    weight: Tensor,
    bias: Tensor | None,
    a: nn.Parameter,
    b: nn.Parameter,
    scale: float,
    dropout: float,
    magnitude: nn.Parameter | None = None,
) -> nn.Module:
    """peft's own layer, in training, around these very tensors; DoRA's where there is a magnitude."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear

    (r, fan_in), fan_out = a.shape, len(weight)
    linear = nn.Linear(fan_in, fan_out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    # their scale is lora_alpha / r
    config = LoraConfig(r=r, lora_alpha=scale * r, lora_dropout=dropout, use_dora=magnitude is not None)  # type: ignore[arg-type]
    layer = PeftLinear(linear, config=config, adapter_name="default", r=r, lora_alpha=scale * r)  # type: ignore[arg-type]
    layer.lora_A["default"].weight = a
    layer.lora_B["default"].weight = b
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight = magnitude  # type: ignore[union-attr]
    return layer.train()


def unsloth_order(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """unsloth's order of operations: S is added by another product, and made again in backward; no dropout."""
    if dropout:
        raise ValueError(f"dropout: this order is for 0, found {dropout}")
    return _UnslothOrder.apply(x, weight, bias, a, b, scale)  # type: ignore[return-value]


class _UnslothOrder(torch.autograd.Function):
    """Eight products of width r where six would do: S is recomputed, and dY·B is computed twice."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        out = F.linear(x, weight, bias)
        return out.addmm_(x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, a, b = ctx.saved_tensors
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        da = ((dy @ low_b).t() @ x).mul_(ctx.scale)
        db = (dy.t() @ (x @ low_a.t())).mul_(ctx.scale)
        dx = (dy @ weight).addmm_(dy @ low_b, low_a, alpha=ctx.scale)
        return dx, None, None, da.to(a.dtype), db.to(b.dtype), None


def split_at_s(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """LoRAFusion's split, without its fused kernels: S is kept, and dS is made once; with dropout x̂ and a mask are kept."""
    return _SplitAtS.apply(x, weight, bias, a, b, scale, dropout)  # type: ignore[return-value]


class _SplitAtS(torch.autograd.Function):
    """Six products of width r, split where S and dS are: arXiv 2510.00206."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scale, dropout):
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        s = dropped @ a.to(x.dtype).t()
        ctx.save_for_backward(dropped, mask, weight, a, b, s)
        ctx.scale, ctx.dropout = scale, dropout
        return F.linear(x, weight, bias).addmm_(s, (b * scale).to(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dropped, mask, weight, a, b, s = ctx.saved_tensors
        low_a = a.to(dy.dtype)
        ds = dy @ (b * ctx.scale).to(dy.dtype)
        db = (dy.t() @ s).mul_(ctx.scale)
        da = ds.t() @ dropped
        dx = dy @ weight
        if mask is None:
            dx.addmm_(ds, low_a)
        else:
            dx += torch.ops.aten.native_dropout_backward(ds @ low_a, mask, 1 / (1 - ctx.dropout))
        return dx, None, None, da.to(a.dtype), db.to(b.dtype), None, None


def compiled() -> Callable[..., Tensor]:
    """`lora_linear`'s reference as torch.compile has it, compiled anew for each shape."""
    from peftkit.kernels.lora_linear import reference

    return torch.compile(reference, dynamic=False)
