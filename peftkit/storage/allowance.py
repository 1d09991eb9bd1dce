"""A limit on what an adapter may ask for while it is made from settings that nobody has compared with tensors yet."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftkit.sites import Site
from peftkit.storage.errors import StorageError
from peftkit.storage.reader import Stored

_ALWAYS = 1 << 24  # numbers, which any machine has room for
_TIMES = 4  # what the file holds: a frozen pair beside a trained one, fp32 from bf16
_MAKE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_MAKE_LIKE = {Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}


def bounded(stored: Stored, sites: Sequence[Site]) -> contextlib.AbstractContextManager[object]:
    """While it is entered, new tensors are refused that together are far larger than the file and the model's weights.

    A rank or a length is a number in a file; the adapter of 10⁹ rows that it may claim is made before its shapes can be
    compared with those stored.

    Raises:
        StorageError: from the call that would make a tensor.
    """
    weights = [p for s in sites for p in s.module._parameters.values() if p is not None]
    number = max(_numbers(vars(stored.config)), default=0)
    side = max(number, max((n for w in weights for n in w.shape), default=0))
    if number * side * len(sites) <= _ALWAYS:  # small whatever they mean: spare each call the question
        return contextlib.nullcontext()
    held = sum(t.numel() for t in (*stored.tensors.values(), *stored.of_all.values()))
    return _Bounded(_ALWAYS + _TIMES * (held + max((w.numel() for w in weights), default=0)))


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _numbers(one)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _numbers(one)


class _Bounded(TorchFunctionMode):
    def __init__(self, left: int):
        super().__init__()
        self._left = left

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKE or func in _MAKE_LIKE:
            size = kwargs.get("size", args[func in _MAKE_LIKE :])
            shape = size[0] if size and isinstance(size[0], Sequence) else size
            count = math.prod(n for n in shape if isinstance(n, int))
            if count > self._left:
                raise StorageError(
                    f"its settings ask for a tensor of the shape {tuple(shape)}, which is far larger than all that the file "
                    "holds; the settings and the tensors are not of one adapter"
                )
            self._left -= count
        return func(*args, **kwargs)
