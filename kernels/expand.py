"""The base's product with the low-rank term added before the result leaves the chip.

    Z = X W + bias + α · mask ∘ (S B)        X: (tokens k), W: (k n), S: (tokens r), B: (r n)
    Y = Z, or g ∘ Z + (1 − g) ∘ bias         g: (n)

Forward it is x, Wᵀ, S and Bᵀ; backward dY, W, dS and A, where dropout masks the low-rank term. Added by a product
of its own, the term costs another read and write of Y. W and B are read by strides, so neither is transposed.
The low-rank product stands behind the loop over k, in chunks of the rank, and adds to the same fp32 sums:
the result is rounded once. With gains, Z is rounded and written beside Y for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit.kernels.gpu import (
    Launch,
    capability,
    ceil_div,
    dot,
    dot_constants,
    jit,
    keep_tile,
    rank_tile,
    reachable,
    shift,
    tl,
)
from peftkit.kernels.philox import keep_mask, threshold
from peftkit.kernels.rescale import reference as rescale_reference

# -- reference ----------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    alpha: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`expand` in plain torch."""
    low = s @ b.to(s.dtype)
    if dropout and seed is not None:
        low = low * keep_mask(seed, len(low), low.shape[1], dropout)
    y = x @ w + alpha * low
    return y if bias is None else y + bias


def reference_gained(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    s: Tensor,
    b: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """`expand_gained` in plain torch."""
    z = reference(x, w, bias, s, b, alpha)
    return rescale_reference(z, gain, bias), z


# -- Triton -------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tokens, columns, depth and ranks of a tile; tiles of tokens that share columns in L2; warps and stages."""

    m: int
    n: int
    k: int
    r: int
    group: int
    warps: int
    stages: int


@jit
def _expand(
    x, w, bias, gain, s, b, y, z, seed, tokens, fan_out, fan_in, r,
    x_row, x_col, w_row, w_col, b_row, b_col, alpha, bar,
    BIAS: tl.constexpr, GAIN: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # programs that run at the same time share rows of x and columns of W
    program = tl.program_id(0)
    across, down = tl.cdiv(fan_out, N), tl.cdiv(tokens, M)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    first = inside // height * N
    rows = (group * GROUP + inside % height) * M + tl.arange(0, M)
    cols, depth = first + tl.arange(0, N), tl.arange(0, K)
    in_rows, in_cols = rows < tokens, cols < fan_out
    long_rows = rows.to(tl.int64)[:, None]

    # the narrow term first: its tiles and its mask are out of the registers when the loop begins
    acc = tl.zeros((M, N), dtype=tl.float32)
    for rank in range(0, r, R):
        ranks = rank + tl.arange(0, R)
        in_ranks = ranks < r
        s_tile = tl.load(s + long_rows * r + ranks[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        b_tile = tl.load(
            b + ranks[:, None] * b_row + cols[None, :] * b_col, mask=in_ranks[:, None] & in_cols[None, :], other=0.0
        )
        acc = dot(s_tile, b_tile.to(s_tile.dtype), acc, WIDE, PRECISION)
    acc *= alpha
    if DROPOUT:
        acc = tl.where(keep_tile(seed, rows, first, bar, N), acc, 0.0)
    if BIAS:
        acc += tl.load(bias + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]

    x_at = x + long_rows * x_row + depth[None, :] * x_col
    w_at = w + depth.to(tl.int64)[:, None] * w_row + cols.to(tl.int64)[None, :] * w_col
    for k in range(0, fan_in, K):
        left = fan_in - k
        x_tile = tl.load(x_at, mask=in_rows[:, None] & (depth < left)[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=(depth < left)[:, None] & in_cols[None, :], other=0.0)
        acc = dot(x_tile, w_tile, acc, WIDE, PRECISION)
        x_at += K * x_col
        w_at += K * w_row

    at = long_rows * fan_out + cols[None, :]
    if GAIN:
        tl.store(z + at, acc.to(z.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])
        g = tl.load(gain + cols, mask=in_cols, other=1.0)
        acc *= g[None, :]
        if BIAS:
            acc += shift(tl.load(bias + cols, mask=in_cols, other=0.0), g)[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


# -- launch -------------------------------------------------------------------------------------------------------------


def tiles(dtype: torch.dtype, dropout: float = 0.0, chip: int = 90, *, gained: bool = False) -> Tiles:
    """The largest tile that fits in the registers: beside a mask, before Hopper, or with gains after it, a smaller one."""
    if dtype is torch.float32:
        return Tiles(64, 64, 32, 16, 8, 4, 3)
    return (
        Tiles(128, 128, 64, 32, 8, 8, 3)
        if dropout or chip < 90 or (gained and chip > 90)
        else Tiles(128, 256, 64, 16, 8, 8, 3)
    )


def launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    y: Tensor,
    alpha: float,
    dropout: float,
    seed: Tensor | None,
    t: Tiles,
    gain: Tensor | None = None,
    z: Tensor | None = None,
) -> Launch:
    """The launch that fills y, and z where there is a gain."""
    (tokens, fan_in), fan_out, r = x.shape, w.shape[1], b.shape[0]
    arguments = dict(
        x=x, w=w, bias=bias, gain=gain, s=s, b=b, y=y, z=z, seed=seed, tokens=tokens, fan_out=fan_out, fan_in=fan_in, r=r,
        x_row=x.stride(0), x_col=x.stride(1), w_row=w.stride(0), w_col=w.stride(1),
        b_row=b.stride(0), b_col=b.stride(1), alpha=alpha, bar=threshold(dropout),
    )  # fmt: skip
    constants = {
        "BIAS": bias is not None, "GAIN": gain is not None, "DROPOUT": dropout > 0, **dot_constants(x.dtype),
        "M": t.m, "N": t.n, "K": t.k, "R": min(t.r, rank_tile(r)), "GROUP": t.group,
    }  # fmt: skip
    grid = (ceil_div(tokens, t.m) * ceil_div(fan_out, t.n),)
    return Launch(_expand, grid, arguments, constants, t.warps, t.stages)


# -- public functions ---------------------------------------------------------------------------------------------------


def expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    alpha: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    t: Tiles | None = None,
) -> Tensor:
    """Y = X W + bias + α · mask ∘ (S B): (tokens n) in the dtype of x.

    x: (tokens k) and w: (k n), in one dtype and of any strides; bias: (n) or None; s: (tokens r) in the dtype of x;
    b: (r n) of any strides, in any floating dtype; seed: (1) in int64, which draws the mask of `dropout`.
    """
    y = x.new_empty(x.shape[0], w.shape[1])
    bias = None if bias is None else bias.contiguous()
    launch(
        reachable(x), w, bias, s.contiguous(), b, y, alpha, dropout, seed, t or tiles(x.dtype, dropout, capability(x))
    )()
    return y


def expand_gained(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    s: Tensor,
    b: Tensor,
    alpha: float,
    t: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = g ∘ Z + (1 − g) ∘ bias, and Z = X W + bias + α · S B: (tokens n) each, in the dtype of x.

    gain: (n) in fp32; all else as for `expand`. Where g is 1, Y is what `expand` gives.
    """
    y, z = (x.new_empty(x.shape[0], w.shape[1]) for _ in range(2))
    bias, t = None if bias is None else bias.contiguous(), t or tiles(x.dtype, 0.0, capability(x), gained=True)
    launch(reachable(x), w, bias, s.contiguous(), b, y, alpha, 0.0, None, t, gain.contiguous(), z)()
    return y, z
