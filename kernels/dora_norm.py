"""The norms of the rows of W + s·BA, without that matrix.

    n² = ‖W‖² + 2s · rowsum((W Aᵀ) ∘ B) + s² · rowsum((B A Aᵀ) ∘ B)        DoRA, arXiv 2402.09353, equation 5

The dearest product is W Aᵀ, of width r; with ‖W‖² it reads W once. Everything is computed in fp32, or fp64 where an
operand is: of a weight in half precision a piece at a time is widened, and stays in the cache.

Where s·BA nearly cancels W the three terms are large and n² is small: its error is that of the terms. Such rows are
computed again from their own numbers. Under torch.compile, torch.export and the transforms of torch.func they are not,
since which rows those are depends on the values; there n² is only kept from falling below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

# Numbers of a weight that are widened at a time: on a CPU they stay in the cache, on a GPU they fill it.
PIECE, GPU_PIECE = 2**18, 2**24
# Rows with n² below this part of the positive terms are computed again; above it their relative error is a few eps.
CANCELLED = 1 / 16


def reference(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`row_norms` as the formula has it."""
    dtype = wide(weight, a, b)
    return torch.linalg.vector_norm(weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype)), dim=-1)


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of norms: fp32, or fp64 where an operand is."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def composed(weight: Tensor) -> bool:
    """Whether values cannot be looked at: under a tracer, a transform, a mode that fakes tensors, or without memory."""
    return (
        torch.compiler.is_compiling()
        or maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or weight.is_meta
    )


@torch.no_grad()
def row_norms(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """‖W + s·BA‖ of every row, and ‖W‖², to be given again as `squares` while W is the same; both detached: (out).

    weight: (out in), in any memory layout, a: (r in), b: (out r); or all three with groups in front. In fp32, or fp64
    where an operand is. No norm is zero: the least is the root of the dtype's smallest normal number, so that a row of
    zeros can be divided by its norm.
    """
    if torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            return row_norms(weight, a, b, scale, squares)
    dtype = wide(weight, a, b)
    a, b = a.to(dtype), b.to(dtype)
    traced = composed(weight)
    cross, squares = _read(weight, a, squares, whole=traced)
    cross = (cross * b).sum(-1)
    square = ((b @ (a @ a.mT)) * b).sum(-1) * (scale * scale)
    found = (
        torch.add(squares, cross, alpha=2 * scale).add_(square)
        if not traced
        else squares + cross * (2 * scale) + square
    )
    if not traced:
        low = found < (squares + square) * CANCELLED
        if low.any():
            found[low] = _again(weight, a, b, scale, low)
    return found.clamp_min(torch.finfo(dtype).tiny).sqrt(), squares


def _read(weight: Tensor, a: Tensor, squares: Tensor | None, *, whole: bool) -> tuple[Tensor, Tensor]:
    """W Aᵀ: (out r), and ‖W‖² of the rows unless it is known."""
    if weight.dtype is a.dtype or whole or weight.dim() == 3:
        w = weight.to(a.dtype)
        return w @ a.mT, _squares(w) if squares is None else squares
    cross = a.new_zeros(weight.shape[0], a.shape[0])
    found = a.new_zeros(weight.shape[0]) if squares is None else squares
    across = weight.stride(0) < weight.stride(1)  # a transposed view lies in memory column by column
    size = (PIECE if weight.is_cpu else GPU_PIECE) // max(1, weight.shape[0 if across else 1])
    axis = 1 if across else 0
    start = 0
    for piece in weight.split(max(1, size), axis):
        w, stop = piece.to(a.dtype), start + piece.shape[axis]
        if across:
            cross.addmm_(w, a[:, start:stop].t())
        else:
            torch.mm(w, a.t(), out=cross[start:stop])
        if squares is None and across:
            found += _squares(w)
        elif squares is None:
            found[start:stop] = _squares(w)
        start = stop
    return cross, found


def _squares(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=-1).square_()


def _again(weight: Tensor, a: Tensor, b: Tensor, scale: float, low: Tensor) -> Tensor:
    """n² of the rows where `low`, from their own numbers; a few rows at a time."""
    if weight.dim() == 3:
        groups = zip(weight, a, b, low, strict=True)
        return torch.cat([_again(*group[:3], scale, group[3]) for group in groups])
    found = []
    for rows in low.nonzero()[:, 0].split(max(1, (PIECE if weight.is_cpu else GPU_PIECE) // weight.shape[1])):
        whole = torch.addmm(weight[rows].to(a.dtype), b[rows], a, alpha=scale)
        found.append(_squares(whole))
    return torch.cat(found) if found else a.new_empty(0)
