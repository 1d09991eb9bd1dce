"""The adapter that puts keys and values in front, and proves that they were attended to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkit.attention.acting import PAST, KeyValues, acting, thread
from peftkit.attention.calls import PrefixedCalls


class Prefixing(KeyValues):
    """What a method's adapter inherits: it gives `prefix()`, and its module attends to that before the tokens.

    Raises:
        RuntimeError: at a call, where the module has computed without it.
    """

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        prefixes = acting(module._modules["peftkit"])
        if prefixes[0] is not self:  # the first of several puts them all in front
            return base(*args, **kwargs)
        if self.bias is not None:
            kwargs[PAST] = _past(module, kwargs.get("past_key_values"))
        if torch.compiler.is_compiling():
            return self._attending(prefixes, base, *args, **kwargs)
        thread.used.discard(id(self))
        result = self._attending(prefixes, base, *args, **kwargs)
        if id(self) not in thread.used:
            raise RuntimeError(
                f"{self.where!r} has computed without its prefix: in this forward its {type(module).__name__} calls "
                f"neither transformers' attention interface nor F.scaled_dot_product_attention; exclude={self.where!r}, "
                "or let it use them (in transformers, set_attn_implementation('sdpa'))"
            )
        return result

    def _attending(self, prefixes: list[KeyValues], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.kind == "interface":
            return base(*args, **kwargs)
        with PrefixedCalls(prefixes):
            return base(*args, **kwargs)


def _past(module: Any, cache: Any) -> Any:
    """How many tokens this attention has seen before; a static cache counts in place."""
    count = 0 if cache is None else cache.get_seq_length(module.layer_idx)
    return count.clone() if isinstance(count, Tensor) else count
