"""The norms of an adapted weight's rows, kept while neither the weight nor the pair has changed."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit.hosts import Host
from peftkit.kernels.dora_norm import composed, row_norms

_SAMPLE = 64  # numbers of a weight that are compared


class _Kept(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[Any, ...]
    sample: Tensor
    a: Tensor
    b: Tensor
    scale: float
    squares: Tensor
    norms: Tensor

    def of_this(self, weight: Tensor) -> bool:
        return self.weight() is weight and self.state == _state(weight) and _same(self.sample, _sample(weight))


class KeptNorms:
    """‖W + s·BA‖ of every row of one host, computed by `row_norms` alone, and kept for as long as it is known to hold.

    A write through `.data`, or by an engine that shards, moves no version counter. So A and B are compared number by
    number with copies of them, which costs little beside a product, and W by identity, address, version counter and a
    sample of its numbers. Nothing is kept under a tracer. What is kept is one tuple, assigned at once, so that threads see a
    whole one; copies and pickles begin with none.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def of(self, host: Host, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The norms of all rows, of all groups together: (out), detached, in fp32 or wider."""
        if composed(weight):
            return row_norms(*host.as_matrices(weight, a, b), scale)[0].reshape(-1)
        kept = self._kept
        squares = None
        if kept is not None and kept.of_this(weight):
            squares = kept.squares
            if kept.scale == scale and _same(kept.a, a) and _same(kept.b, b):
                return kept.norms
        with torch.inference_mode(False), torch.no_grad():  # autograd will save what is kept, whatever the mode is now
            found, squares = row_norms(*host.as_matrices(weight.detach(), a.detach(), b.detach()), scale, squares)
            norms = found.reshape(-1)
            sample = _sample(weight).clone()
            own_a, own_b = (t.detach().clone(memory_format=torch.contiguous_format) for t in (a, b))
        self._kept = _Kept(weakref.ref(weight), _state(weight), sample, own_a, own_b, scale, squares, norms)
        return norms

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptNorms:
        return KeptNorms()

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptNorms, ()


def _state(weight: Tensor) -> tuple[Any, ...]:
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _sample(weight: Tensor) -> Tensor:
    """Some numbers, spread over rows and columns alike."""
    n = weight.numel()
    step = n // _SAMPLE | 1
    return (weight.detach() if weight.requires_grad else weight).as_strided(
        (n // step,), (step,), weight.storage_offset()
    )


def _same(kept: Tensor, now: Tensor) -> bool:
    """Whether every bit is the same, which as whole words takes half as long to ask as number by number."""
    if kept.dtype is not now.dtype or kept.shape != now.shape or kept.device != now.device:
        return False
    ends = now.shape[-1] * now.itemsize % 8, int(now.storage_offset()) * now.itemsize % 8
    if any(ends) or not now.numel() or not now.is_contiguous():
        return torch.equal(kept, now)
    return torch.equal(kept.view(torch.int64), now.detach().view(torch.int64))
