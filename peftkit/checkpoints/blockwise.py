"""Norms, products and differences of large tensors in fp64, of which a part at a time is held in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 20  # numbers at a time; but a row at least, where a tensor is not contiguous


class Compared(NamedTuple):
    """Two tensors a and b of one shape.

    Attributes:
        apart: ‖a − b‖².
        a, b: ‖a‖² and ‖b‖².
        product: ⟨a, b⟩.
        largest: the largest |a − b| of one number; NaN where it is NaN at any.
        equal: whether all numbers are the same; a NaN is the same as one of its own dtype and bits.
    """

    apart: float
    a: float
    b: float
    product: float
    largest: float
    equal: bool


@torch.no_grad()
def compared(a: Tensor, b: Tensor) -> Compared:
    """Compare tensors of one shape, of any dtypes. What is not finite makes a sum that is not."""
    alike = same_bits(a, b)
    sums = torch.zeros(4, dtype=torch.float64)
    largest = torch.zeros((), dtype=torch.float64)
    for x, y in blocks(a, b):
        d = torch.zeros_like(x) if alike else x - y
        sums += torch.stack([d @ d, x @ x, y @ y, x @ y])
        largest = torch.maximum(largest, d.abs().max())  # Python's max would pass a NaN over
    exact = a.dtype != b.dtype or a.is_floating_point()  # integers of 64 bits are not told apart in fp64
    apart, size, other, product = sums.tolist()
    return Compared(apart, size, other, product, float(largest), alike or (exact and bool(largest == 0)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and all bits are the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


@torch.no_grad()
def square_norm(d: Tensor) -> float:
    """‖d‖²."""
    return sum(float(x @ x) for (x,) in blocks(d))


def blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The numbers of tensors of one shape, the same places of each at a time, in fp64: (n,)."""
    if not tensors[0].numel():
        return
    if all(t.is_contiguous() for t in tensors):
        tensors = tuple(t.reshape(-1) for t in tensors)
    rows = max(1, _BLOCK // tensors[0][0].numel())
    for parts in zip(*(t.split(rows) for t in tensors), strict=True):
        yield [part.double().reshape(-1) for part in parts]
