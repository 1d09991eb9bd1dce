"""What dY gives the pair, in one read of it.

    dS = α · dY B       (tokens r)
    dB = α · dYᵀ S      (out r)

Two products of width r that each would read dY, which is by far the largest of the operands. A program takes a block
of columns of dY and a run of its rows: its share of dB stays in registers while rows go by, and of every tile it
makes its share of dS. Both shares are summed in a second step in a fixed order, without atomics, so the same
input gives the same bits. Sums are fp32, and so is dB; dS is rounded once to the dtype of dY.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit.kernels.gpu import Launch, ceil_div, dot, dot_constants, jit, rank_tile, reachable, split, tl

# -- reference ----------------------------------------------------------------------------------------------------------


def reference(dy: Tensor, b: Tensor, s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """`dys_dyb` in plain torch."""
    return alpha * (dy @ b.to(dy.dtype)), alpha * (dy.t() @ s)


# -- Triton -------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tokens and columns of a tile of dY; warps and stages."""

    m: int
    n: int
    warps: int
    stages: int


@jit
def _dys_dyb(
    dy, b, s, ds_parts, db_parts, tokens, fan_out, r, dy_row, dy_col, length, alpha,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    cols, ranks = block * N + tl.arange(0, N), tl.arange(0, R)
    in_cols, in_ranks = cols < fan_out, ranks < r
    narrow = in_cols[:, None] & in_ranks[None, :]
    b_tile = tl.load(b + cols[:, None] * r + ranks[None, :], mask=narrow, other=0.0).to(dy.dtype.element_ty)
    db = tl.zeros((N, R), dtype=tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, tokens), M):
        rows = start + tl.arange(0, M)
        in_rows = rows < tokens
        long_rows = rows.to(tl.int64)[:, None]
        dy_tile = tl.load(
            dy + long_rows * dy_row + cols[None, :] * dy_col, mask=in_rows[:, None] & in_cols[None, :], other=0.0
        )
        low = in_rows[:, None] & in_ranks[None, :]
        s_tile = tl.load(s + long_rows * r + ranks[None, :], mask=low, other=0.0)
        ds = dot(dy_tile, b_tile, tl.zeros((M, R), dtype=tl.float32), WIDE, PRECISION)
        at = ds_parts + (block.to(tl.int64) * tokens + long_rows) * r + ranks[None, :]
        tl.store(at, (ds * alpha).to(ds_parts.dtype.element_ty), mask=low)
        db = dot(tl.trans(dy_tile), s_tile.to(dy_tile.dtype), db, WIDE, PRECISION)
    at = db_parts + (part.to(tl.int64) * fan_out + cols[:, None]) * r + ranks[None, :]
    tl.store(at, db * alpha, mask=narrow)


# -- launch -------------------------------------------------------------------------------------------------------------


def tiles(dtype: torch.dtype, r: int) -> Tiles:
    """Wide blocks of columns, since every block leaves a share of dS; fewer where the rank fills the registers."""
    if dtype is torch.float32:
        return Tiles(16, 32, 8, 2) if r > 64 else Tiles(32, 64, 4, 2)
    if r > 64:
        return Tiles(32, 64, 8, 2)
    return Tiles(64, 128, 8, 2) if r > 32 else Tiles(64, 256, 8, 3)


def launch(dy: Tensor, b: Tensor, s: Tensor, alpha: float, t: Tiles) -> tuple[Launch, Tensor, Tensor]:
    """The launch, and what it fills: shares of dS (blocks tokens r), and of dB (parts out r)."""
    (tokens, fan_out), r = dy.shape, b.shape[1]
    blocks = ceil_div(fan_out, t.n)
    count, length = split(tokens, 256, blocks, t.m)
    ds = dy.new_empty(blocks, tokens, r, dtype=dy.dtype if blocks == 1 else torch.float32)
    db = dy.new_empty(count, fan_out, r, dtype=torch.float32)
    arguments = dict(
        dy=dy, b=b, s=s, ds_parts=ds, db_parts=db, tokens=tokens, fan_out=fan_out, r=r,
        dy_row=dy.stride(0), dy_col=dy.stride(1), length=length, alpha=alpha,
    )  # fmt: skip
    constants = {**dot_constants(dy.dtype), "M": t.m, "N": t.n, "R": rank_tile(r)}
    return Launch(_dys_dyb, (blocks, count), arguments, constants, t.warps, t.stages), ds, db


# -- public function ----------------------------------------------------------------------------------------------------


def dys_dyb(dy: Tensor, b: Tensor, s: Tensor, alpha: float, t: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """dS = α · dY B: (tokens r) in the dtype of dy, and dB = α · dYᵀ S: (out r) in fp32.

    dy: (tokens out), of any strides; b: (out r), r ≤ 256, in any floating dtype; s: (tokens r).
    """
    run, ds, db = launch(reachable(dy), b.contiguous(), s.contiguous(), alpha, t or tiles(dy.dtype, b.shape[1]))
    if not len(dy):
        return dy.new_empty(0, b.shape[1]), db[0].zero_()
    run()
    return (ds[0] if len(ds) == 1 else ds.sum(0).to(dy.dtype)), (db[0] if len(db) == 1 else db.sum(0))
