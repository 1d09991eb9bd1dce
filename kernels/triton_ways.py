"""A LoRA linear's forward and backward where Triton runs: `addmm`, `epilogue` and `augmented`.

The mask is never kept: its seed draws it again, and is the same on every way. dA and dB of a wider pair are summed
and returned in fp32. Nothing here reads a number back from the device, so CUDA graphs can hold all of it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from peftkit.kernels import augmented, philox
from peftkit.kernels.dys_dyb import dys_dyb, dys_dyb_gained
from peftkit.kernels.expand import expand, expand_gained
from peftkit.kernels.rescale import gradients
from peftkit.kernels.rescale_rows import rescale_rows
from peftkit.kernels.shrink import add_shrink_dx, shrink, shrink_da
from peftkit.kernels.torch_way import Needs, add_low_rank, gradient_of_s, wide_mm

# Up to this rank the shares of dS that `dys_dyb` writes and reads are less than the second read of dY that it saves.
SHARED_RANK = 32


def forward(
    way: str,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; S: (tokens r); z = x Wᵀ + bias, or y where weight is None, plus the low-rank term: (tokens out).

    x: (tokens in), y: (tokens out). Without a gain z is the output.
    """
    alpha = scale / philox.kept(dropout)
    fused = way == "epilogue"
    s = shrink(x, a, dropout, seed) if fused or dropout else F.linear(x, a.to(x.dtype))
    if fused and weight is not None and gain is not None:
        out, z = expand_gained(x, weight.t(), bias, gain, s, b.t(), alpha)
        return out, s, z
    if fused and weight is not None:
        z = expand(x, weight.t(), bias, s, b.t(), alpha)
    elif way == "augmented" and weight is not None:
        z = augmented.forward(x, weight, bias, s, b, alpha)
    else:
        z = add_low_rank(x, y, weight, bias, s, b, alpha)
    return z if gain is None else rescale_rows(z, gain, bias), s, z


def backward(
    way: str,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gained: tuple[Tensor | None, Tensor, Tensor | None] | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX: (tokens in), dA: (r in), dB: (out r), each where `needs` asks for it; dgain: (out) where z is given.

    gained: z where the gain is trained, the gain, and the bias; z: (tokens out).
    """
    x_needs, a_needs, b_needs = needs
    alpha = scale / philox.kept(dropout)
    fused = way == "epilogue"
    dx = ds = da = db = dgain = None
    if gained is not None:
        z, gain, bias = gained
        if z is not None and s is not None:  # whatever the way: dZ has to be written, and then the rest is nearly free
            ds, db, dy, dgain = dys_dyb_gained(dy, b, s, alpha, z, gain, bias)
        else:
            dz, dgain = gradients(dy, z, gain, bias, -1, any(needs))
            if dz is None:
                return None, None, None, dgain
            dy = dz
    if way == "augmented" and ds is None and x_needs and weight is not None:
        dx, ds = augmented.backward(dy, weight, b, alpha)
    elif fused and ds is None and b_needs and s is not None and b.shape[1] <= SHARED_RANK:
        ds, db = dys_dyb(dy, b, s, alpha)
    elif ds is None and (x_needs or a_needs):
        ds = gradient_of_s(dy, b, alpha)
    if b_needs and db is None:
        assert s is not None
        db = wide_mm(s, dy).mul_(alpha).t()
    if a_needs:
        assert x is not None and ds is not None
        da = shrink_da(ds, x, dropout, seed) if fused or dropout else wide_mm(ds, x)
    if x_needs:
        assert ds is not None
        if fused and weight is not None:
            dx = expand(dy, weight, None, ds, a, 1.0, dropout, seed)
        elif weight is None and not dropout:
            dx = ds @ a.to(ds.dtype)
        elif dx is not None:  # rows of `augmented` are longer; the sum is written where they are dense
            dx = add_shrink_dx(dx, ds, a, dropout, seed, out=dx.new_empty(dx.shape))
        else:
            dx = dy @ weight if weight is not None else dy.new_zeros(len(dy), a.shape[1])
            dx = add_shrink_dx(dx, ds, a, dropout, seed) if dropout else dx.addmm_(ds, a.to(dx.dtype))
    db = db if b_needs else None
    return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), dgain
