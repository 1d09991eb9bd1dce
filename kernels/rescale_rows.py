"""`rescale` in one pass over z on a GPU, without a copy of z in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit.kernels.gpu import Launch, ceil_div, jit, shift, tl


class Tiles(NamedTuple):
    """Tokens and features of a tile; warps."""

    m: int
    n: int
    warps: int


TILES = Tiles(16, 256, 4)


@jit
def _rescale_rows(
    z, gain, bias, y, tokens, features, z_row, y_row,
    BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    in_cols = cols < features
    inside, long_rows = (rows < tokens)[:, None] & in_cols[None, :], rows.to(tl.int64)[:, None]
    g = tl.load(gain + cols, mask=in_cols, other=1.0)
    wide = tl.load(z + long_rows * z_row + cols[None, :], mask=inside, other=0.0).to(tl.float32) * g[None, :]
    if BIAS:
        wide += shift(tl.load(bias + cols, mask=in_cols, other=0.0), g)[None, :]
    tl.store(y + long_rows * y_row + cols[None, :], wide.to(y.dtype.element_ty), mask=inside)


def launch(z: Tensor, gain: Tensor, bias: Tensor | None, y: Tensor, t: Tiles = TILES) -> Launch:
    """The launch that fills y, which may be z."""
    tokens, features = z.shape
    arguments = dict(
        z=z, gain=gain, bias=bias, y=y, tokens=tokens, features=features, z_row=z.stride(0), y_row=y.stride(0)
    )
    constants = {"BIAS": bias is not None, "M": t.m, "N": t.n}
    return Launch(_rescale_rows, (ceil_div(tokens, t.m), ceil_div(features, t.n)), arguments, constants, t.warps, 1)


def rescale_rows(z: Tensor, gain: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """g ∘ z + (1 − g) ∘ bias: (tokens features) in the dtype of z, in `out` where it is given, which may be z.

    z: (tokens features), dense along a row; gain: (features) in fp32; bias: (features) or None.
    """
    out = torch.empty_like(z, memory_format=torch.contiguous_format) if out is None else out
    launch(z, gain.contiguous(), None if bias is None else bias.contiguous(), out)()
    return out
