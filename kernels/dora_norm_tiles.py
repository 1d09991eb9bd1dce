"""The norms of the rows of W + s·BA by tiles of that matrix, in one read of W.

    n² = Σ (W_tile + s · B A_tile)²

No sum cancels, and nothing of W's size is written: a tile of BA is made in registers beside the tile of W that it is added
to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit.kernels.gpu import Launch, ceil_div, dot, dot_constants, jit, rank_tile, split, tl


class Tiles(NamedTuple):
    """Rows, columns and ranks of a tile; warps and stages."""

    m: int
    k: int
    r: int
    warps: int
    stages: int


@jit
def _row_squares(
    w, a, b, parts, fan_out, fan_in, r, w_row, w_col, length, scale,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows, part = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1)
    in_rows, long_rows = rows < fan_out, rows.to(tl.int64)[:, None]
    acc = tl.zeros((M, K), dtype=tl.float32)  # by column of a tile, and only then along rows
    for start in range(part * length, tl.minimum((part + 1) * length, fan_in), K):
        cols = start + tl.arange(0, K)
        in_cols = cols < fan_in
        low = tl.zeros((M, K), dtype=tl.float32)
        for rank in range(0, r, R):
            ranks = rank + tl.arange(0, R)
            in_ranks = ranks < r
            b_tile = tl.load(b + long_rows * r + ranks[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
            a_tile = tl.load(
                a + ranks[:, None] * fan_in + cols[None, :], mask=in_ranks[:, None] & in_cols[None, :], other=0.0
            )
            low = dot(b_tile, a_tile, low, WIDE, PRECISION)
        at = w + long_rows * w_row + cols.to(tl.int64)[None, :] * w_col
        whole = tl.load(at, mask=in_rows[:, None] & in_cols[None, :], other=0.0).to(tl.float32) + low * scale
        acc += whole * whole
    tl.store(parts + part * fan_out + rows, tl.sum(acc, axis=1), mask=in_rows)


def tiles(dtype: torch.dtype) -> Tiles:
    """Long rows for W to be read along; dtype: of the pair."""
    return Tiles(64, 128, 16 if dtype is torch.float32 else 32, 8, 3)


def launch(weight: Tensor, a: Tensor, b: Tensor, scale: float, t: Tiles) -> tuple[Launch, Tensor]:
    """The launch, and the parts of n² that it fills: (parts out) in fp32."""
    (fan_out, fan_in), r = weight.shape, a.shape[0]
    blocks = ceil_div(fan_out, t.m)
    count, length = split(fan_in, 512, blocks, t.k)
    parts = weight.new_empty(count, fan_out, dtype=torch.float32)
    arguments = dict(
        w=weight, a=a, b=b, parts=parts, fan_out=fan_out, fan_in=fan_in, r=r, w_row=weight.stride(0),
        w_col=weight.stride(1), length=length, scale=scale,
    )  # fmt: skip
    # whatever torch does with products of fp32: a norm in TF32 would change with the flag
    precision = {**dot_constants(a.dtype), "PRECISION": "tf32x3" if a.dtype is torch.float32 else "ieee"}
    constants = {**precision, "M": t.m, "K": t.k, "R": min(t.r, rank_tile(r))}
    return Launch(_row_squares, (blocks, count), arguments, constants, t.warps, t.stages), parts


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float, t: Tiles | None = None) -> Tensor:
    """‖W + s·BA‖ of every row: (out) in fp32; at least the root of the smallest normal number.

    weight: (out in), of any strides, in fp32, fp16 or bf16; a: (r in), b: (out r), in one of these dtypes each.
    """
    if a.dtype is not b.dtype:
        a, b = a.float(), b.float()
    run, parts = launch(weight, a.contiguous(), b.contiguous(), float(scale), t or tiles(a.dtype))
    run()
    return parts.sum(0).clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()
