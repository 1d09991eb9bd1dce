"""The norms of the rows of W + s·BA, without that matrix.

    n² = ‖W‖² + 2s · rowsum((W Aᵀ) ∘ B) + s² · rowsum((B A Aᵀ) ∘ B)        DoRA, arXiv 2402.09353, equation 5

The dearest product is W Aᵀ, of width r; with ‖W‖² it reads W once. Everything is computed in fp32, or fp64 where an
operand is; a weight in half precision is widened a piece at a time.

Where s·BA nearly cancels W the three terms are large and n² is small: its error is that of the terms. Such rows are
computed again from their own numbers. Under torch.compile, torch.export and the transforms of torch.func they are not,
since which rows those are depends on the values; there n² is only kept from falling below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

# Numbers of a weight in half precision that are widened at a time.
PIECE, GPU_PIECE = 2**20, 2**24
# Rows with n² below this part of the positive terms are computed again; above it their relative error is a few eps.
CANCELLED = 1 / 16


def reference(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s·BA‖ of every row, of the dense matrix: what the others are tested against."""
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


def factored(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`row_norms` by the formula above, and ‖W‖²."""
    dtype = wide(weight, a, b)
    a, b = a.to(dtype), b.to(dtype)
    traced = composed(weight)
    twice = a * (2 * scale)
    cross, squares = _read(weight, twice, squares, whole=traced)
    found = squares
    if a.shape[-2]:
        gram = twice @ a.mT * (scale / 2)
        inner = torch.addmm(cross, b, gram) if b.dim() == 2 else torch.baddbmm(cross, b, gram)
        found = torch.linalg.vecdot(b, inner) + squares
        if not traced and _may_cancel(squares, b, gram):
            # without signs, since what BA adds up from may cancel within it as well
            terms = torch.linalg.vecdot(b.abs(), b.abs() @ gram.abs())
            low = found < (squares + terms) * CANCELLED
            if low.any():
                found[low] = _again(weight, a, b, scale, low)
    return found.clamp_min(torch.finfo(dtype).tiny).sqrt_(), squares


def _may_cancel(squares: Tensor, b: Tensor, gram: Tensor) -> bool:
    """Whether s·BA is more than two thirds as long as W in any row, by a bound of its length over all of them.

    Where it is not, n² is at least 1/9 of ‖W‖², and the terms are at most 13/9 of it. squares: (out), b: (out r),
    gram: s² A Aᵀ: (r r).
    """
    least, most = torch.aminmax(b)
    longest = max(float(most), -float(least)) ** 2 * b.shape[-1] * float(torch.linalg.vector_norm(gram))
    return not 9 / 4 * longest <= float(squares.min())


def _read(weight: Tensor, a: Tensor, squares: Tensor | None, *, whole: bool) -> tuple[Tensor, Tensor]:
    """W Aᵀ: (out r), and ‖W‖² of the rows unless that is known."""
    if whole or weight.dim() == 3 or (weight.dtype is a.dtype and (squares is not None or weight.stride(-1) == 1)):
        w = weight.to(a.dtype)
        return w @ a.mT, _squares(w) if squares is None else squares
    across = weight.stride(0) < weight.stride(1)  # a transposed view: its columns are what lies together in memory
    lying = weight.t() if across else weight
    step = len(lying) if weight.dtype is a.dtype else (PIECE if weight.is_cpu else GPU_PIECE) // max(1, lying.shape[1])
    step = max(1, step)
    # made once: fresh memory of this size costs more to get than to fill
    scratch = None if weight.dtype is a.dtype else a.new_empty(min(step, len(lying)), lying.shape[1])
    products, sums = [], []
    for i, piece in enumerate(lying.split(step)):
        w = piece if scratch is None else scratch[: len(piece)].copy_(piece)
        if len(a):
            products.append(a[:, i * step : i * step + len(w)] @ w if across else w @ a.t())
        if squares is None:
            sums.append(_squares_down(w) if across else _squares(w))
    cross = a.new_empty(weight.shape[0], 0)
    if products:
        cross = sum(products[1:], products[0]).t() if across else torch.cat(products)
    if squares is None:
        squares = sum(sums[1:], sums[0]) if across else torch.cat(sums)
    return cross, squares


def _squares(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=-1).square_()


def _squares_down(w: Tensor) -> Tensor:
    """Of columns, which `vector_norm` reads a number at a time."""
    found = w.new_zeros(w.shape[1])
    for piece in w.split(max(1, 2**16 // max(1, w.shape[1])) if w.is_cpu else max(1, len(w))):
        found += piece.square().sum(0)
    return found


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
