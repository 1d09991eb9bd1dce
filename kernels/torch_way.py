"""A LoRA linear's forward and backward in torch's own products: on a CPU, and wherever Triton is not.

x is never copied or widened, both updates are added into the base's result by the product that makes them, and
1/(1 − p) is folded into the scale. The mask is kept, a byte a number of x, unless a seed draws it again.

Gradients of a pair wider than x are summed and returned in fp32: on a CPU x is widened for them in pieces that stay
in the cache. Those of a pair in the dtype of x are rounded to it by the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.kernels import philox

# With dropout a CPU works through x in pieces of this many numbers, so that masked copies stay in the cache.
PIECE = 2**18

Needs = tuple[bool, bool, bool]


def forward(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """x Wᵀ + bias, or y where weight is None, plus the low-rank term; S: (tokens r); the mask; α.

    x: (tokens in), y: (tokens out); the mask as bytes, None without dropout; α: scale over the probability of keeping.
    """
    s, keep, kept = _shrink(x, a.to(x.dtype), dropout, seed)
    alpha = scale / kept
    return add_low_rank(x, y, weight, bias, s, b, alpha), s, keep, alpha


def add_low_rank(
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, s: Tensor, b: Tensor, alpha: float
) -> Tensor:
    """x Wᵀ + bias, or y where weight is None, plus α · S Bᵀ, added by the product that makes it; y is not changed."""
    bt = b.to(x.dtype).t()
    if weight is None:
        assert y is not None
        return torch.addmm(y, s, bt, alpha=alpha)
    return F.linear(x, weight, bias).addmm_(s, bt, alpha=alpha)


def gradient_of_s(dy: Tensor, b: Tensor, alpha: float) -> Tensor:
    """dS = α · dY B: (tokens r)."""
    return dy.new_empty(len(dy), b.shape[1]).addmm_(dy, b.to(dy.dtype), beta=0, alpha=alpha)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    keep: Tensor | None,
    alpha: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX: (tokens in), dA: (r in), dB: (out r), each where `needs` asks for it; x is there where dA is asked for."""
    x_needs, a_needs, b_needs = needs
    dx = da = db = None
    if x_needs and weight is not None:
        dx = dy @ weight
    if x_needs or a_needs:
        ds = gradient_of_s(dy, b, alpha)
        low = a.to(dy.dtype)
        if keep is not None:
            if x_needs and dx is None:
                dx = dy.new_zeros(keep.shape)
            da = _backward_through_mask(x if a_needs else None, keep, ds, low, dx, wide=a.dtype is not dy.dtype)
        else:
            if x_needs:
                dx = ds @ low if dx is None else dx.addmm_(ds, low)
            if a_needs:
                assert x is not None
                da = wide_mm(ds, x) if a.dtype is not x.dtype else ds.t() @ x
    if b_needs:
        assert s is not None
        # Sᵀ dY rather than dYᵀ S: a third faster, since the long side is read along its rows.
        if b.dtype is not s.dtype:
            db = wide_mm(s, dy).mul_(alpha).t()
        else:
            db = s.new_empty(s.shape[1], dy.shape[1]).addmm_(s.t(), dy, beta=0, alpha=alpha).t()
    return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype)


def _shrink(x: Tensor, a: Tensor, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor | None, float]:
    """(mask ∘ x) Aᵀ: (tokens r); the mask as bytes: (tokens in); the probability that a number is kept."""
    if not dropout:
        return F.linear(x, a), None, 1.0
    if seed is not None:
        keep = philox.keep_mask(seed, len(x), x.shape[1], dropout).view(torch.uint8)
        return F.linear(x * keep, a), keep, philox.kept(dropout)
    keep = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if not x.is_cpu:
        return F.linear(x * keep.bernoulli_(1 - dropout), a), keep, 1 - dropout

    # Sixteen random bits for each number, four to a draw, cost a fraction of bernoulli_. The probability is
    # then a multiple of 2**-16, and the rescaling uses that very multiple, so the mean is exact.
    bar = philox.threshold(dropout)
    rows = _rows_per_piece(x)
    noise = torch.empty((rows * x.shape[1] + 3) // 4, dtype=torch.int64)
    masked = x.new_empty(rows, x.shape[1])
    s = x.new_empty(x.shape[0], a.shape[0])
    for x_piece, keep_piece, s_piece in zip(x.split(rows), keep.split(rows), s.split(rows), strict=True):
        drawn = noise.random_(-(2**63), None).view(torch.int16)[: x_piece.numel()].view(x_piece.shape)
        torch.ge(drawn, bar - 2**15, out=keep_piece)
        torch.mm(masked[: len(x_piece)].copy_(keep_piece).mul_(x_piece), a.t(), out=s_piece)
    return s, keep, philox.kept(dropout)


def wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ · right, summed and returned in fp32 or wider; left: (tokens r) and right: (tokens n), in one dtype."""
    if left.dtype.itemsize >= 4:
        return left.t() @ right
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    out, rows = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float32), _rows_per_piece(right)
    for left_piece, right_piece in zip(left.split(rows), right.split(rows), strict=True):
        out.addmm_(left_piece.float().t(), right_piece.float())
    return out


def _backward_through_mask(
    x: Tensor | None, keep: Tensor, ds: Tensor, a: Tensor, dx: Tensor | None, *, wide: bool
) -> Tensor | None:
    """Adds mask ∘ (dS A) to dx; returns dSᵀ (mask ∘ x) where x is given, in fp32 or wider."""
    rows = _rows_per_piece(keep)
    mask = ds.new_empty(rows, keep.shape[1])
    scratch = torch.empty_like(mask)
    da = torch.zeros_like(a, dtype=torch.promote_types(a.dtype, torch.float32))
    for start in range(0, len(keep), rows):
        piece = slice(start, start + rows)
        ds_piece = ds[piece]
        mask_piece = mask[: len(ds_piece)].copy_(keep[piece])
        scratch_piece = scratch[: len(ds_piece)]
        if dx is not None:
            dx[piece].addcmul_(torch.mm(ds_piece, a, out=scratch_piece), mask_piece)
        if x is not None:
            masked = torch.mul(x[piece], mask_piece, out=scratch_piece)
            da += wide_mm(ds_piece, masked) if wide else ds_piece.t() @ masked
    return None if x is None else da


def _rows_per_piece(x: Tensor) -> int:
    return max(1, min(len(x), PIECE // x.shape[1])) if x.is_cpu else max(1, len(x))
