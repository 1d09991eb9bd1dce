"""The narrow product, and the two gradients that go through it, with dropout that is drawn again each time.

    S  = (mask ∘ x) Aᵀ           (tokens r)
    dA = dSᵀ (mask ∘ x)          (r in)
    dX = dX + mask ∘ (dS A)      (tokens in)

Each reads x or dX once, and nothing of that size is made beside it: the mask is a function of seed and position
(`philox`). 1/(1 − p) is left to whoever scales dS and S. A and dS may be wider or narrower than x: products are of
the dtype of x, sums are fp32. dA is summed over parts of the tokens, first within a part, then over the parts in
their order, so that the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit.kernels.gpu import Launch, ceil_div, dot, dot_constants, jit, keep_tile, rank_tile, reachable, split, tl
from peftkit.kernels.philox import keep_mask, threshold

# -- reference ----------------------------------------------------------------------------------------------------------


def reference(x: Tensor, a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """`shrink` in plain torch, differentiable."""
    return _masked(x, dropout, seed) @ a.to(x.dtype).t()


def reference_da(ds: Tensor, x: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """`shrink_da` in plain torch."""
    return ds.t() @ _masked(x, dropout, seed)


def reference_dx(dx: Tensor, ds: Tensor, a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """`add_shrink_dx` in plain torch, out of place."""
    return dx + _masked(ds @ a.to(ds.dtype), dropout, seed)


def _masked(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    return x * keep_mask(seed, len(x), x.shape[1], dropout) if dropout and seed is not None else x


# -- Triton -------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tokens, features and ranks of a tile; warps and stages."""

    m: int
    k: int
    warps: int
    stages: int


@jit
def _shrink(
    x, a, s, seed, tokens, fan_in, r, x_row, x_col, bar,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    ranks = tl.arange(0, R)
    in_rows, in_ranks = rows < tokens, ranks < r
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    acc = tl.zeros((M, R), dtype=tl.float32)
    for first in range(0, fan_in, K):
        cols = first + tl.arange(0, K)
        in_cols = cols < fan_in
        x_tile = tl.load(x_rows + cols[None, :] * x_col, mask=in_rows[:, None] & in_cols[None, :], other=0.0)
        if DROPOUT:
            x_tile = tl.where(keep_tile(seed, rows, first, bar, K), x_tile, 0.0)
        a_tile = tl.load(
            a + ranks[None, :] * fan_in + cols[:, None], mask=in_ranks[None, :] & in_cols[:, None], other=0.0
        )
        acc = dot(x_tile, a_tile.to(x_tile.dtype), acc, WIDE, PRECISION)
    at = s + rows.to(tl.int64)[:, None] * r + ranks[None, :]
    tl.store(at, acc.to(s.dtype.element_ty), mask=in_rows[:, None] & in_ranks[None, :])


@jit
def _shrink_da(
    ds, x, parts, seed, tokens, fan_in, r, x_row, x_col, bar, length,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    first, part = tl.program_id(0) * K, tl.program_id(1)
    cols, ranks = first + tl.arange(0, K), tl.arange(0, R)
    in_cols, in_ranks = cols < fan_in, ranks < r
    acc = tl.zeros((K, R), dtype=tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, tokens), M):
        rows = start + tl.arange(0, M)
        in_rows = rows < tokens
        long_rows = rows.to(tl.int64)[:, None]
        x_tile = tl.load(
            x + long_rows * x_row + cols[None, :] * x_col, mask=in_rows[:, None] & in_cols[None, :], other=0.0
        )
        if DROPOUT:
            x_tile = tl.where(keep_tile(seed, rows, first, bar, K), x_tile, 0.0)
        ds_tile = tl.load(ds + long_rows * r + ranks[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        acc = dot(tl.trans(x_tile), ds_tile.to(x_tile.dtype), acc, WIDE, PRECISION)
    at = parts + (part * r + ranks)[None, :].to(tl.int64) * fan_in + cols[:, None]
    tl.store(at, acc, mask=in_ranks[None, :] & in_cols[:, None])


@jit
def _add_shrink_dx(
    dx, ds, a, out, seed, tokens, fan_in, r, dx_row, out_row, bar,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows, first = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * K
    cols = first + tl.arange(0, K)
    in_rows, in_cols = rows < tokens, cols < fan_in
    long_rows = rows.to(tl.int64)[:, None]
    low = tl.zeros((M, K), dtype=tl.float32)
    for rank in range(0, r, R):
        ranks = rank + tl.arange(0, R)
        in_ranks = ranks < r
        ds_tile = tl.load(ds + long_rows * r + ranks[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        a_tile = tl.load(
            a + ranks[:, None] * fan_in + cols[None, :], mask=in_ranks[:, None] & in_cols[None, :], other=0.0
        )
        low = dot(ds_tile, a_tile.to(ds_tile.dtype), low, WIDE, PRECISION)
    if DROPOUT:
        low = tl.where(keep_tile(seed, rows, first, bar, K), low, 0.0)
    inside = in_rows[:, None] & in_cols[None, :]
    low += tl.load(dx + long_rows * dx_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + long_rows * out_row + cols[None, :], low.to(out.dtype.element_ty), mask=inside)


# -- launches -----------------------------------------------------------------------------------------------------------


def tiles(dtype: torch.dtype, r: int) -> Tiles:
    """Small tiles of tokens, so that there are programs enough to keep memory busy."""
    if dtype is torch.float32:
        return Tiles(16, 32, 8, 2) if r > 64 else Tiles(32, 64, 4, 3)
    return Tiles(32, 64, 8, 3) if r > 64 else Tiles(32, 128, 4, 3)


def _constants(dtype: torch.dtype, dropout: float, t: Tiles, r: int) -> dict[str, Any]:
    return {"DROPOUT": dropout > 0, **dot_constants(dtype), "M": t.m, "K": t.k, "R": r}


def shrink_launch(x: Tensor, a: Tensor, s: Tensor, dropout: float, seed: Tensor | None, t: Tiles) -> Launch:
    """The launch that fills its output."""
    (tokens, fan_in), r = x.shape, a.shape[0]
    arguments = dict(
        x=x, a=a, s=s, seed=seed, tokens=tokens, fan_in=fan_in, r=r, x_row=x.stride(0), x_col=x.stride(1),
        bar=threshold(dropout),
    )  # fmt: skip
    constants = _constants(x.dtype, dropout, t, rank_tile(r))
    return Launch(_shrink, (ceil_div(tokens, t.m),), arguments, constants, t.warps, t.stages)


def shrink_da_launch(ds: Tensor, x: Tensor, dropout: float, seed: Tensor | None, t: Tiles) -> tuple[Launch, Tensor]:
    """The launch, and the parts of dA that it fills: (parts r in) in fp32."""
    (tokens, fan_in), r = x.shape, ds.shape[1]
    count, length = split(tokens, 512, ceil_div(fan_in, t.k), t.m)
    parts = x.new_empty(count, r, fan_in, dtype=torch.float32)
    arguments = dict(
        ds=ds, x=x, parts=parts, seed=seed, tokens=tokens, fan_in=fan_in, r=r, x_row=x.stride(0), x_col=x.stride(1),
        bar=threshold(dropout), length=length,
    )  # fmt: skip
    constants = _constants(x.dtype, dropout, t, rank_tile(r))
    return Launch(_shrink_da, (ceil_div(fan_in, t.k), count), arguments, constants, t.warps, t.stages), parts


def add_shrink_dx_launch(
    dx: Tensor, ds: Tensor, a: Tensor, out: Tensor, dropout: float, seed: Tensor | None, t: Tiles
) -> Launch:
    """The launch that fills its output."""
    (tokens, fan_in), r = dx.shape, a.shape[0]
    arguments = dict(
        dx=dx, ds=ds, a=a, out=out, seed=seed, tokens=tokens, fan_in=fan_in, r=r, dx_row=dx.stride(0),
        out_row=out.stride(0), bar=threshold(dropout),
    )  # fmt: skip
    constants = _constants(dx.dtype, dropout, t, min(64, rank_tile(r)))
    grid = ceil_div(tokens, t.m), ceil_div(fan_in, t.k)
    return Launch(_add_shrink_dx, grid, arguments, constants, t.warps, t.stages)


# -- public functions ---------------------------------------------------------------------------------------------------


def shrink(x: Tensor, a: Tensor, dropout: float = 0.0, seed: Tensor | None = None, t: Tiles | None = None) -> Tensor:
    """S = (mask ∘ x) Aᵀ: (tokens r) in the dtype of x.

    x: (tokens in), of any strides; a: (r in), r ≤ 256, in any floating dtype; dropout: in [0, 1), of which the mask is
    drawn by seed: (1) in int64, on the device of x.
    """
    s = x.new_empty(x.shape[0], a.shape[0])
    a = a.to(x.dtype).contiguous()  # rounded once, rather than by every program, each of which reads all of it
    shrink_launch(reachable(x), a, s, dropout, seed, t or tiles(x.dtype, a.shape[0]))()
    return s


def shrink_da(
    ds: Tensor, x: Tensor, dropout: float = 0.0, seed: Tensor | None = None, t: Tiles | None = None
) -> Tensor:
    """dA = dSᵀ (mask ∘ x): (r in) in fp32. ds: (tokens r); x, dropout and seed as in `shrink`."""
    if not x.shape[0]:
        return x.new_zeros(ds.shape[1], x.shape[1], dtype=torch.float32)
    launch, parts = shrink_da_launch(ds.contiguous(), reachable(x), dropout, seed, t or tiles(x.dtype, ds.shape[1]))
    launch()
    return parts.sum(0) if len(parts) > 1 else parts[0]


def add_shrink_dx(
    dx: Tensor,
    ds: Tensor,
    a: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out: Tensor | None = None,
    t: Tiles | None = None,
) -> Tensor:
    """dX + mask ∘ (dS A), rounded once, in `out`, which is dX itself where it is None.

    dx, out: (tokens in), dense along a row; ds: (tokens r); a: (r in).
    """
    out = dx if out is None else out
    add_shrink_dx_launch(dx, ds.contiguous(), a.contiguous(), out, dropout, seed, t or tiles(dx.dtype, a.shape[0]))()
    return out
