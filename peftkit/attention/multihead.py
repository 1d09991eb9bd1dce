"""What `nn.MultiheadAttention` computes, with prefixes in front of its keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.attention.acting import KeyValues, in_front, length_of, note, widened


def multi_head_attention(
    prefixes: Sequence[KeyValues],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`, whose arguments these are, with prefixes in front.

    Args:
        query, key, value: (tokens batch width), or without batch.
        key_padding_mask: (batch tokens), attn_mask: (queries tokens) or (batch·heads queries tokens); True masks out, or
            floats are added.

    Returns:
        (queries batch width), and the weights of what is attended to but for the prefixes, whose columns are left out:
        (batch queries tokens), or by head. With a prefix their sum is below 1.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal=True is a hint about attn_mask, which is missing")
    batched = query.dim() == 3
    if not batched:
        same_k, same_v = key is query, value is key
        query = query.unsqueeze(1)
        key = query if same_k else key.unsqueeze(1)
        value = key if same_v else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    batch, queries, tokens = query.shape[1], query.shape[0], key.shape[0]
    if not use_separate_proj_weight and key is query and value is key:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)  # type: ignore[arg-type]
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if in_proj_weight is None else in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # type: ignore[arg-type]
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(-1, batch, -1)]), torch.cat([v, bias_v.expand(-1, batch, -1)])
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _additive(attn_mask, key_padding_mask, batch, num_heads, q.dtype)
    taken = note(prefixes, k[:, :, :tokens], v[:, :, :tokens])
    length = 0 if taken else length_of(prefixes)
    if mask is not None:  # what stands behind the tokens, bias_k and the zeros, is never masked
        mask = widened(F.pad(mask, (0, k.shape[2] - tokens)), length, k.shape[2])
    if not taken:
        k, v = in_front(prefixes, k, v)
    p = dropout_p if training else 0.0
    found = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        attending = torch.softmax(scores if mask is None else scores + mask, -1)
        attending = F.dropout(attending, p) if p else attending
        out = attending @ v
        found = attending[..., length:]
        found = found.mean(1) if average_attn_weights else found
        found = found if batched else found.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, p)
    out = out.permute(2, 0, 1, 3).reshape(queries, batch, -1)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    return (out if batched else out.squeeze(1)), found


def _additive(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to add, broadcast over (batch heads queries tokens)."""
    found = None
    if attn_mask is not None:
        found = _floats(attn_mask, dtype)
        found = found[None, None] if found.dim() == 2 else found.view(batch, heads, *found.shape[1:])
    if padding is not None:
        added = _floats(padding, dtype)[:, None, None]
        found = added if found is None else found + added
    return found


def _floats(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
