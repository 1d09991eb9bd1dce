"""The norms of an adapted weight's rows, kept while neither the weight nor the pair has changed."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.hosts import Host
from peftkit.kernels.dora_norm import composed
from peftkit.kernels.rescale import shift_of
from peftkit.kernels.row_norms import row_norms

_SAMPLE = 64  # numbers of a weight that are compared


class _Folded(NamedTuple):
    """What evaluation needs of a pair, a magnitude m and a bias."""

    magnitude: Tensor
    bias: Tensor | None
    gain: Tensor
    shift: Tensor | None
    left: Tensor

    def of_these(self, magnitude: Tensor, bias: Tensor | None) -> bool:
        if bias is None or self.bias is None:
            return bias is self.bias and _same(self.magnitude, magnitude)
        return _same(self.magnitude, magnitude) and _same(self.bias, bias)


class _Kept(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[Any, ...]
    sample: Tensor
    a: Tensor
    b: Tensor
    scale: float
    squares: Tensor | None
    norms: Tensor
    folded: list[_Folded]  # one, or none yet

    def of_this(self, weight: Tensor) -> bool:
        return self.weight() is weight and self.state == _state(weight) and _same(self.sample, _sample(weight))


class KeptNorms:
    """‖W + s·BA‖ of every row of one host, computed by `row_norms` alone, and kept for as long as it is known to hold.

    A write through `.data`, or by an engine that shards, moves no version counter. So A and B are compared number by
    number with copies of them, which costs little beside a product, and W by identity, address, version counter and a
    sample of its numbers. Nothing is kept under a tracer, nor off a CPU, where waiting for the answer would cost more than
    the norms. What is kept is one tuple, assigned at once, so that threads see a whole one; copies and pickles begin with
    none.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def of(self, host: Host, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The norms of all rows, of all groups together: (out), detached, in fp32 or wider."""
        if not weight.is_cpu or composed(weight):
            return row_norms(*host.as_matrices(weight, a, b), scale)[0].reshape(-1)
        return self._current(host, weight, a, b, scale).norms

    def folded(
        self, host: Host, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """g = m / n: (out); (1 − g) ∘ bias: (out); the transpose of `g ∘ s·B`: (r out); kept likewise, without gradients,
        untraced.
        """
        kept = self._current(host, weight, a, b, scale)
        found = kept.folded[0] if kept.folded else None
        if found is None or not found.of_these(magnitude, bias):
            with torch.inference_mode(False), torch.no_grad():
                m, c = magnitude.detach().clone(), None if bias is None else bias.detach().clone()
                gain = m.to(kept.norms.dtype) / kept.norms
                shift = None if c is None else shift_of(gain, c)
                found = _Folded(m, c, gain, shift, (kept.b * (gain * scale)[:, None]).t().contiguous())
            kept.folded[:] = [found]
        return found.gain, found.shift, found.left

    def _current(self, host: Host, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> _Kept:
        kept = self._kept
        of_weight = squares = None
        if kept is not None and kept.of_this(weight):
            of_weight, squares = (kept.weight, kept.state, kept.sample), kept.squares
            if kept.scale == scale and _same(kept.a, a) and _same(kept.b, b):
                return kept
        with torch.inference_mode(False), torch.no_grad():  # autograd will save what is kept, whatever the mode is now
            found, squares = row_norms(*host.as_matrices(weight.detach(), a.detach(), b.detach()), scale, squares)
            norms = found.reshape(-1)
            of_weight = of_weight or (weakref.ref(weight), _state(weight), _sample(weight).clone())
            own_a, own_b = (t.detach().clone(memory_format=torch.contiguous_format) for t in (a, b))
        kept = _Kept(*of_weight, own_a, own_b, scale, squares, norms, [])
        self._kept = kept
        return kept

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptNorms:
        return KeptNorms()

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptNorms, ()


def _state(weight: Tensor) -> tuple[Any, ...]:
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _sample(weight: Tensor) -> Tensor:
    """Some numbers, spread over rows and columns alike."""
    there = int(weight.untyped_storage().nbytes()) // weight.itemsize - int(weight.storage_offset())
    n = min(weight.numel(), there)  # an expanded one has fewer numbers than places
    step = n // _SAMPLE | 1
    return (weight.detach() if weight.requires_grad else weight).as_strided(
        (n // step,), (step,), weight.storage_offset()
    )


def _same(kept: Tensor, now: Tensor) -> bool:
    """Whether the numbers are the same; what lies in one piece of a CPU's memory is compared there, several times faster."""
    if kept.dtype is not now.dtype or kept.shape != now.shape or kept.device != now.device:
        return False
    if _memcmp is None or not now.is_cpu or type(now) not in (nn.Parameter, Tensor) or not now.is_contiguous():
        return torch.equal(kept, now)
    return _memcmp(kept.data_ptr(), now.data_ptr(), kept.numel() * kept.itemsize) == 0


def _c_memcmp() -> Any:
    try:
        found = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no such handle on Windows
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return found


_memcmp = _c_memcmp()
