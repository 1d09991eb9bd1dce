"""What dY gives the pair, in one read of it.

    dS = α · dZ B       (tokens r)
    dB = α · dZᵀ S      (out r)          dZ = dY, or with gains g ∘ dY, which is written, and
    dg = Σ dY ∘ (Z − bias)               (out), over tokens

Products of width r, and a sum, that each would read dY, which is by far the largest of the operands. A program takes a block
of columns of dY and a run of its rows: its share of dB stays in registers while rows go by, and of every tile it
makes its share of dS. Shares are summed in a second step in a fixed order, without atomics, so the same
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


def reference_gained(
    dy: Tensor, b: Tensor, s: Tensor, alpha: float, z: Tensor, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dys_dyb_gained` in plain torch."""
    dz = (dy * gain).to(dy.dtype)
    part = z if bias is None else z - bias
    return *reference(dz, b, s, alpha), dz, (part * dy).sum(0)


# -- Triton -------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tokens and columns of a tile of dY; warps and stages."""

    m: int
    n: int
    warps: int
    stages: int


@jit
def _dys_dyb(
    dy, b, s, z, gain, bias, ds_parts, db_parts, dz, dg_parts,
    tokens, fan_out, r, dy_row, dy_col, length, alpha,
    GAIN: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    cols, ranks = block * N + tl.arange(0, N), tl.arange(0, R)
    in_cols, in_ranks = cols < fan_out, ranks < r
    narrow = in_cols[:, None] & in_ranks[None, :]
    b_tile = tl.load(b + cols[:, None] * r + ranks[None, :], mask=narrow, other=0.0).to(dy.dtype.element_ty)
    db = tl.zeros((N, R), dtype=tl.float32)
    dg = tl.zeros((N,), dtype=tl.float32)
    g, c = dg, dg
    if GAIN:
        g = tl.load(gain + cols, mask=in_cols, other=0.0)
        if BIAS:
            c = tl.load(bias + cols, mask=in_cols, other=0.0).to(tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, tokens), M):
        rows = start + tl.arange(0, M)
        in_rows = rows < tokens
        long_rows = rows.to(tl.int64)[:, None]
        dy_tile = tl.load(
            dy + long_rows * dy_row + cols[None, :] * dy_col, mask=in_rows[:, None] & in_cols[None, :], other=0.0
        )
        if GAIN:
            at = long_rows * fan_out + cols[None, :]
            inside = in_rows[:, None] & in_cols[None, :]
            z_tile = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                z_tile -= c[None, :]
            wide = dy_tile.to(tl.float32)
            dg += tl.sum(wide * z_tile, axis=0)
            dy_tile = (wide * g[None, :]).to(dy_tile.dtype)
            tl.store(dz + at, dy_tile, mask=inside)
        low = in_rows[:, None] & in_ranks[None, :]
        s_tile = tl.load(s + long_rows * r + ranks[None, :], mask=low, other=0.0)
        ds = dot(dy_tile, b_tile, tl.zeros((M, R), dtype=tl.float32), WIDE, PRECISION)
        at = ds_parts + (block.to(tl.int64) * tokens + long_rows) * r + ranks[None, :]
        tl.store(at, (ds * alpha).to(ds_parts.dtype.element_ty), mask=low)
        db = dot(tl.trans(dy_tile), s_tile.to(dy_tile.dtype), db, WIDE, PRECISION)
    at = db_parts + (part.to(tl.int64) * fan_out + cols[:, None]) * r + ranks[None, :]
    tl.store(at, db * alpha, mask=narrow)
    if GAIN:
        tl.store(dg_parts + part * fan_out + cols, dg, mask=in_cols)


# -- launch -------------------------------------------------------------------------------------------------------------


def tiles(dtype: torch.dtype, r: int, *, gained: bool = False) -> Tiles:
    """Wide blocks of columns, since every block leaves a share of dS; fewer where the rank, or Z, fills the registers."""
    if dtype is torch.float32:
        return Tiles(16, 32, 8, 2) if r > 64 else Tiles(32, 64, 8 if gained else 4, 2)
    if r > 64:
        return Tiles(32, 32 if gained and r > 128 else 64, 8, 2)
    if gained:
        return Tiles(64, 64 if r > 32 else 128, 8, 2)
    return Tiles(64, 128, 8, 2) if r > 32 else Tiles(64, 256, 8, 3)


def launch(
    dy: Tensor,
    b: Tensor,
    s: Tensor,
    alpha: float,
    t: Tiles,
    z: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Launch, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The launch, and what it fills: shares of dS (blocks tokens r) and of dB (parts out r); with gains dZ and shares of
    dg (parts out).
    """
    (tokens, fan_out), r = dy.shape, b.shape[1]
    blocks = ceil_div(fan_out, t.n)
    count, length = split(tokens, 256, blocks, t.m)
    ds = dy.new_empty(blocks, tokens, r, dtype=dy.dtype if blocks == 1 else torch.float32)
    db = dy.new_empty(count, fan_out, r, dtype=torch.float32)
    dz = dg = None
    if gain is not None:
        dz, dg = dy.new_empty(tokens, fan_out), dy.new_empty(count, fan_out, dtype=torch.float32)
    arguments = dict(
        dy=dy, b=b, s=s, z=z, gain=gain, bias=bias, ds_parts=ds, db_parts=db, dz=dz, dg_parts=dg,
        tokens=tokens, fan_out=fan_out, r=r, dy_row=dy.stride(0), dy_col=dy.stride(1), length=length, alpha=alpha,
    )  # fmt: skip
    constants = {
        "GAIN": gain is not None, "BIAS": bias is not None, **dot_constants(dy.dtype),
        "M": t.m, "N": t.n, "R": rank_tile(r),
    }  # fmt: skip
    return Launch(_dys_dyb, (blocks, count), arguments, constants, t.warps, t.stages), ds, db, dz, dg


# -- public functions ---------------------------------------------------------------------------------------------------


def dys_dyb(dy: Tensor, b: Tensor, s: Tensor, alpha: float, t: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """dS = α · dY B: (tokens r) in the dtype of dy, and dB = α · dYᵀ S: (out r) in fp32.

    dy: (tokens out), of any strides; b: (out r), r ≤ 256, in any floating dtype; s: (tokens r).
    """
    t = t or tiles(dy.dtype, b.shape[1])
    run, ds, db, _, _ = launch(reachable(dy), b.contiguous(), s.contiguous(), alpha, t)
    run()
    return _summed(dy, ds, db)


def dys_dyb_gained(
    dy: Tensor, b: Tensor, s: Tensor, alpha: float, z: Tensor, gain: Tensor, bias: Tensor | None, t: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS and dB as `dys_dyb` of dZ = g ∘ dY; dZ: (tokens out) in the dtype of dy; dg = Σ dY ∘ (z − bias): (out) in fp32.

    z: (tokens out); gain: (out) in fp32; bias: (out) or None.
    """
    t = t or tiles(dy.dtype, b.shape[1], gained=True)
    bias = None if bias is None else bias.contiguous()
    given = reachable(dy), b.contiguous(), s.contiguous(), alpha, t, z.contiguous(), gain.contiguous(), bias
    run, ds, db, dz, dg = launch(*given)
    run()
    assert dz is not None and dg is not None
    ds, db = _summed(dy, ds, db)
    return ds, db, dz, dg.sum(0) if len(dy) else dg[0].zero_()


def _summed(dy: Tensor, ds: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
    """The shares, in a fixed order."""
    if not len(dy):
        return dy.new_empty(0, ds.shape[2]), db[0].zero_()
    return (ds[0] if len(ds) == 1 else ds.sum(0).to(dy.dtype)), (db[0] if len(db) == 1 else db.sum(0))
