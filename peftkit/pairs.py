"""Low-rank pairs, whatever method they belong to: their settings, and several as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_settings(r: int | Mapping[str, int], alpha: float | Mapping[str, float] | None, dropout: float) -> None:
    """Refuse what no pair can have.

    Raises:
        ValueError: a rank below 1, an alpha that is zero or no finite number, a dropout outside [0, 1).
    """
    for rank in r.values() if isinstance(r, Mapping) else [r]:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r: a rank is an integer of at least 1, not {rank!r}")
    for a in alpha.values() if isinstance(alpha, Mapping) else [alpha]:
        if a is not None and (isinstance(a, bool) or not math.isfinite(a) or a == 0):
            raise ValueError(f"alpha: a finite number other than 0, not {a!r}; with 0 or NaN nothing could be learned")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: a probability in [0, 1), not {dropout!r}")


def draw_(a: Tensor, b: Tensor, init: str, r: int, *, embedding: bool) -> None:
    """Initial values, in place, of which one matrix is zero: B, or of an embedding A.

    `"gaussian"` has std 1/r; else A is uniform in ±1/√in.
    """
    if embedding:
        a.zero_()
        b.normal_()
        return
    if init == "gaussian":
        a.normal_(std=1 / r)
    else:
        bound = 1 / math.sqrt(a.numel() // a.shape[0])
        a.uniform_(-bound, bound)
    b.zero_()


def side_by_side(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Pairs `(A, B, scale)` as the one pair of their ranks together; differentiable. Scales go into B."""
    scale = pairs[0][2]
    b = [b if s == scale else b * (s / scale) for _, b, s in pairs]
    return torch.cat([a for a, _, _ in pairs]), torch.cat(b, dim=1), scale
