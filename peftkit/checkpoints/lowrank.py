"""The nearest matrix of a rank, as a pair.

Eckart and Young (Psychometrika 1, 1936): of all matrices of rank r, the first r terms of the singular value decomposition
come nearest in the Frobenius norm, and what is lost is the norm of the other singular values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit.checkpoints.blockwise import square_norm
from peftkit.storage import StorageError

_MORE = 8  # columns beyond the rank that a randomised decomposition draws


class Truncated(NamedTuple):
    """`B A` near a matrix D. A: (r n), B: (m r).

    Attributes:
        whole: ‖D‖², in the Frobenius norm.
        lost: ‖D − BA‖².
    """

    a: Tensor
    b: Tensor
    whole: float
    lost: float


def of_product(b: Tensor, a: Tensor, r: int | None) -> Truncated:
    """The nearest pair of rank `r` to `b @ a`; None is the rank that the product can have. b: (m R), a: (R n).

    The product is not computed: with `b = Q₁R₁` and `aᵀ = Q₂R₂` its singular values are those of `R₁R₂ᵀ`: (R R).
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    u, sigma, vh = _decomposed(upper @ lower.mT)
    r = len(sigma) if r is None else min(r, len(sigma))
    lost = float(sigma[r:].double().square().sum())
    return _pair(left @ u[:, :r], sigma[:r], vh[:r] @ right.mT, float(sigma.double().square().sum()), lost)


def of_matrix(d: Tensor, r: int | None, *, iterations: int | None = None, seed: int = 0) -> Truncated:
    """The nearest pair of rank `r` to `d`: (m n), which is overwritten; None is full rank.

    Args:
        iterations: None decomposes `d` whole, by LAPACK's gesdd. A number takes the randomised range finder of Halko et
            al. (arXiv 0909.4061, algorithm 4.4) with that many power iterations: for r far below m and n much
            faster, and not the nearest but near it; what is lost is measured and not estimated.
        seed: of what the range finder draws.
    """
    limit = min(d.shape)
    r = limit if r is None else min(r, limit)
    if iterations is None or r + _MORE >= limit:
        u, sigma, vh = _decomposed(d)
        squares = sigma.double().square()
        return _pair(u[:, :r], sigma[:r], vh[:r], float(squares.sum()), float(squares[r:].sum()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, sigma, v = torch.svd_lowrank(d, q=r + _MORE, niter=iterations)
    whole = square_norm(d)
    found = _pair(u[:, :r], sigma[:r], v[:, :r].mT, whole, 0.0)
    return found._replace(lost=square_norm(d.addmm_(found.b, found.a, alpha=-1)))


def _decomposed(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, Σ, Vᴴ`.

    Raises:
        StorageError: LAPACK finds no singular values, as where numbers are near the end of their range.
    """
    try:
        return torch.linalg.svd(d, full_matrices=False)
    except RuntimeError as error:  # LinAlgError is one, and is not exported
        raise StorageError(
            f"a change of the shape {tuple(d.shape)}, with numbers up to {float(d.abs().max()):.3g}, has no singular values "
            f"that can be computed: {error}"
        ) from error


def check_iterations(iterations: int | None) -> None:
    """Refuse what is no number of power iterations.

    Raises:
        ValueError: a negative one, or none at all.
    """
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0):
        raise ValueError(
            f"iterations: a number of power iterations, or None for an exact decomposition, not {iterations!r}"
        )


def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """`⟨B₁A₁, B₂A₂⟩` of pairs `(A, B)`, through the small matrices `B₁ᵀB₂` and `A₁A₂ᵀ`."""
    (a1, b1), (a2, b2) = one, other
    return float(((b1.mT @ b2) * (a1 @ a2.mT)).sum())


def _pair(u: Tensor, sigma: Tensor, vh: Tensor, whole: float, lost: float) -> Truncated:
    root = sigma.sqrt()  # on both sides alike, so that neither leaves the range of a narrow dtype first
    return Truncated(root[:, None] * vh, u * root, whole, lost)
