"""The base's product and the low-rank term as one product of plain matrices.

    Y = [X │ S] · [W │ B]ᵀ            X: (tokens k), S: (tokens r), W: (n k), B: (n r), any scale folded into B
    [dX │ dS] = dY · [W │ B]          then dX is completed by dS

The library's own product does all of it, at the price of writing X, and W unless its owner gave it room, into a
wider buffer. Columns are padded to sixteen, for loads of sixteen bytes that begin where rows do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Storages that `with_room` made, by identity, and their weights' widths: only there are the columns behind nobody's.
_roomy: dict[int, tuple[StorageWeakRef, int]] = {}


def room(r: int) -> int:
    """Columns that a rank takes."""
    return -(-r // 16) * 16


def with_room(weight: Tensor, r: int) -> Tensor:
    """A copy of `weight`, (n k), that owns `room(r)` further columns, so that no later product need copy it.

    It is a view with longer rows; to train a module that way: `module.weight.data = with_room(module.weight.data, 16)`.
    A copy of it, as `.to()` and deepcopy make, is an ordinary weight again.
    """
    n, k = weight.shape
    view = weight.new_zeros(n, k + room(r))[:, :k].copy_(weight)
    for key in [key for key, (ref, _) in _roomy.items() if ref.expired()]:
        del _roomy[key]
    ref = StorageWeakRef(view.untyped_storage())
    _roomy[ref.cdata] = ref, k
    return view


def _has_room(weight: Tensor, columns: int) -> bool:
    if weight.stride() != (weight.stride(0), 1) or weight.stride(0) < weight.shape[1] + columns:
        return False
    ref, width = _roomy.get(weight.untyped_storage()._cdata, (None, 0))
    return ref is not None and not ref.expired() and weight.storage_offset() == 0 and weight.shape[1] == width


def beside(left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """[left │ alpha · right │ 0]: (rows, k + room(r)) in the dtype of `left`; in its own room where it has any."""
    k, r = left.shape[1], right.shape[1]
    if _has_room(left, room(r)):
        # through `data`, since what others saved of the weight has not changed
        wide = left.data.as_strided((len(left), k + room(r)), left.stride())
    else:
        wide = left.new_empty(len(left), k + room(r))
        wide[:, :k].copy_(left.detach())
    torch.mul(right.detach(), alpha, out=wide[:, k : k + r])
    wide[:, k + r :].zero_()
    return wide


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, alpha: float) -> Tensor:
    """X Wᵀ + bias + alpha · S Bᵀ: (tokens n)."""
    return F.linear(beside(x, s), beside(weight, b, alpha), bias)


def backward(dy: Tensor, weight: Tensor, b: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """dY W: (tokens k), a view with longer rows, and dS = alpha · dY B: (tokens r)."""
    k = weight.shape[1]
    both = dy @ beside(weight, b, alpha)
    return both[:, :k], both[:, k : k + b.shape[1]]
