"""Prefixes where a module calls torch's own attention functions: hand-written attention and `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftkit.attention.acting import KeyValues, causal, in_front, length_of, note, widened
from peftkit.attention.multihead import multi_head_attention


class PrefixedCalls(TorchFunctionMode):
    """Within the block, torch's attention functions see the prefixes in front.

    A mode is of its thread alone, and while it is on `nn.MultiheadAttention` leaves its fused path by itself.
    """

    def __init__(self, prefixes: Sequence[KeyValues]):
        super().__init__()
        self.prefixes, self.trains = prefixes, torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._check()
            return _attend(self.prefixes, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return multi_head_attention(self.prefixes, *args, **kwargs)
        if func is torch.Tensor.unflatten:  # written in Python, it calls super(), which torch.compile cannot trace here
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _check(self) -> None:
        trained = any(p.requires_grad for a in self.prefixes for p in a.parameters())
        if trained and self.trains and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.prefixes[0].where!r} computes attention in a reentrant checkpoint of its own, which is computed "
                "again where no prefix is known; checkpoint the whole attention"
            )


def _attend(
    prefixes: Sequence[KeyValues],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention` with prefixes in front; `key`: (… heads tokens head_dim)."""
    if note(prefixes, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    if attn_mask is None and is_causal:
        attn_mask = causal(query, key)
    if attn_mask is not None:
        attn_mask = widened(attn_mask, length_of(prefixes), key.shape[-2])
    key, value = in_front(prefixes, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
