"""Sums of changes in which they get in each other's way less: TIES-merging and DARE.

Both papers speak of task vectors, the differences that fine-tuning makes to weights. Here that is the change ΔW of one
matrix, dense. To trim, drop or elect signs in A and B instead, as is also done, is something else: the product of trimmed
factors is not a trimmed product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Change = Callable[[], Tensor]  # makes a change anew, so that several need not be held at once


def trimmed(change: Tensor, density: float) -> Tensor:
    """TIES, step 1 (Yadav et al., arXiv 2306.01708): the largest share `density` by magnitude stays; in place.

    Numbers as large as the smallest that stays stay too, so the order of numbers does not matter.
    """
    n = change.numel()
    keep = max(1, round(density * n))
    smallest = change.abs().flatten().kthvalue(n - keep + 1).values
    return change.masked_fill_(change.abs() < smallest, 0.0)


def dropped(change: Tensor, density: float, seed: int, *names: object) -> Tensor:
    """DARE (Yu et al., arXiv 2311.03099, eq. 3): each number stays with probability `density`, divided by it; in place.

    What is drawn depends on the seed and the names alone.
    """
    digest = hashlib.blake2b("\0".join(map(str, (seed, *names))).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    stays = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return change.mul_(stays).div_(density)


def summed(changes: Sequence[Change]) -> Tensor:
    """Their sum."""
    total = changes[0]()
    for change in changes[1:]:
        total.add_(change())
    return total


def elected(changes: Sequence[Change]) -> Tensor:
    """TIES, steps 2 and 3: at each place the sign of the sum, and the mean of the changes that have it.

    Where the sum is zero no sign is elected, and nothing stays.
    """
    sign = summed(changes).sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change in changes:
        one = change()
        agrees = one.sign() == sign  # where none is elected, these are zeros
        total.add_(one.mul_(agrees))
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))
