"""Rows before the tokens of a body: what its forward gets with them, and what is left of its output without them.

Masks, positions and token types are lengthened with the embeddings, and the output is cut to the caller's tokens, so
that whatever stands around the body sees as many positions as it gave. A cache holds the rows like tokens. Only an
empty one gets them; it is then marked, and from the second call on masks and positions alone are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftkit.bodies import Body, is_causal

Marks = tuple[tuple[str, int], ...]  # of each prompt its name and its number of rows
_MARK = "_peftkit_prompts"
_DYNAMIC = "cannot take a prompt; generate with a dynamic one, cache_implementation=None"


def call_with(
    rows: Tensor, marks: Marks, body: Body, base: Callable[..., Any], args: Any, kwargs: Any, *, keep: bool
) -> Any:
    """What `base`, the forward of `body`, computes with `rows: n dim` before every sequence of tokens.

    Args:
        marks: whose rows these are, for the cache.
        keep: leave their positions in the output, for a decoder to attend to.

    Raises:
        ValueError: a cache that was filled without these rows, or by others; a mask or positions that do not belong to
            what the cache holds; more positions than the body has; packed sequences.
    """
    if len(args) > len(body.names):
        return base(*args, **kwargs)  # which says what is wrong
    given = body.named(args, kwargs)
    ids, cache = body.ids, given.get("past_key_values")
    held = _held(cache, marks)
    if held is not None:
        tokens = next((t.shape[1] for t in (given.get(ids), given.get("inputs_embeds")) if t is not None), 0)
        _go_on(given, rows.shape[0], tokens, held, body)
        return base(**given)
    if (given.get(ids) is None) == (given.get("inputs_embeds") is None):
        return base(**given)
    total = _start(given, rows, body)
    out = base(**given)
    _mark(cache, out, marks)
    return out if keep else _cut(out, rows.shape[0], total)


# -- the first call -----------------------------------------------------------------------------------------------------


def _start(given: dict[str, Any], rows: Tensor, body: Body) -> int:
    """Put the rows before the tokens; returns how many positions there are now."""
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = body.embedding(given[body.ids])
    if embeds.dim() != 3:
        raise ValueError(f"the tokens' embeddings are {tuple(embeds.shape)}, expected (batch, tokens, dim)")
    batch, tokens, _ = embeds.shape
    n = rows.shape[0]
    given[body.ids] = None
    given["inputs_embeds"] = torch.cat([rows.to(embeds).expand(batch, -1, -1), embeds], 1)
    for key, value in list(given.items()):
        if not isinstance(value, Tensor):
            continue
        if key.endswith("token_type_ids"):
            given[key] = torch.cat([value.new_zeros(*value.shape[:-1], n), value], -1)
        elif key in ("position_ids", "cache_position"):
            before = torch.arange(n, device=value.device, dtype=value.dtype).expand(*value.shape[:-1], n)
            given[key] = torch.cat([before, value + n], -1)
    cache, mask, positions = (given.get(k) for k in ("past_key_values", "attention_mask", "position_ids"))
    _check_limit(body, positions, n + tokens, n)
    if mask is not None:
        _check_mask(mask)
        if body.counts_places and mask.dim() == 2 and not torch.compiler.is_compiling() and not bool(mask[:, 0].all()):
            raise ValueError(
                f"padding on the left would stand between the prompt and the tokens, and this {type(body.module).__name__} "
                "counts places (a sliding window, a recurrent state or ALiBi); pad on the right, or give one text at a time"
            )
        given["attention_mask"] = _lengthened(mask, n, tokens, body)
    elif positions is not None and cache is None:
        given["attention_mask"] = _one_sequence(positions, n, batch)
    _make_room(cache, n)
    return n + tokens


def _one_sequence(positions: Tensor, n: int, batch: int) -> Tensor:
    """The mask of sequences that are one each, said where positions alone would be read as where sequences begin."""
    later = positions[..., n:]
    if not torch.compiler.is_compiling() and positions.dim() == 2 and bool((later.diff() != 1).any()):
        raise ValueError(
            "position_ids that do not go on one by one mean several sequences packed in a row, of which only the first "
            "would have the prompt before it; give each a row of its own, or an attention_mask to say that it is one"
        )
    return torch.ones(batch, positions.shape[-1], device=positions.device, dtype=torch.long)


def _lengthened(mask: Tensor, n: int, tokens: int, body: Body) -> Tensor:
    """The mask of the tokens as one of rows and tokens.

    Of four dimensions it says what each token sees, to which the rows are added: where tokens see none behind them, rows
    see none of the tokens, and else what any token sees. A static cache's has columns for places still empty.
    """
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(mask.shape[0], n), mask], -1)
    allowed, hidden = _entries(mask)
    *lead, count, columns = mask.shape
    left = mask.new_full((*lead, n + count, n), allowed)
    if _sees_none_behind(mask, hidden, body):
        left[..., :n, :].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=mask.device).triu(1), hidden)
        above = mask.new_full((*lead, n, columns), hidden)
    else:
        above = mask.amax(-2, keepdim=True).expand(*lead, n, columns)
    return torch.cat([left, torch.cat([above, mask], -2)], -1)


def _sees_none_behind(mask: Tensor, hidden: Any, body: Body) -> bool:
    """Whether tokens see none behind them, as the body says of itself or the mask shows."""
    if is_causal(body.module) or torch.compiler.is_compiling():
        return is_causal(body.module)
    seen = mask if mask.dtype == torch.bool else mask > hidden / 2
    return mask.shape[-1] > 1 and not bool(seen.triu(1).any())


def _make_room(cache: Any, n: int) -> None:
    """Let a cache of a fixed size, which allocates its memory when it is first filled, hold the rows beside its tokens."""
    fixed = [x for x in getattr(cache, "layers", ()) if hasattr(x, "max_cache_len")]
    if any(x.is_sliding for x in fixed):
        raise ValueError(f"a static cache with a sliding window {_DYNAMIC}")
    if any(x.is_initialized for x in fixed):
        raise ValueError(
            f"the static cache was allocated already, for {fixed[0].max_cache_len} positions without the {n} rows of the "
            "prompt; begin with a new one"
        )
    for x in fixed:
        x.max_cache_len += n


# -- the calls after it ---------------------------------------------------------------------------------------------------


def _held(cache: Any, marks: Marks) -> Any:
    """How many positions the cache holds, rows and tokens; None where it is empty, or there is none."""
    if cache is None:
        return None
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(f"past_key_values is a {type(cache).__name__}, which does not say how much it holds")
    held = cache.get_seq_length()
    if isinstance(held, Tensor) and not torch.compiler.is_compiling():
        held = int(held)
    if not isinstance(held, Tensor) and held == 0:
        return None
    found = getattr(cache, _MARK, ())
    if found != marks:
        what = f"with {' and '.join(f'{n} rows' for _, n in found)} of another prompt" if found else "without a prompt"
        raise ValueError(
            f"past_key_values was filled {what}, so what it holds does not belong to the prompt that acts now; "
            "begin with an empty cache"
        )
    return held


def _go_on(given: dict[str, Any], n: int, tokens: int, held: Any, body: Body) -> None:
    """Move the mask and positions of further tokens past the rows that the cache holds."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    known = not isinstance(held, Tensor)  # under torch.compile a static cache does not say
    if positions is not None:
        if mask is None and known and positions.dim() == 2 and not torch.compiler.is_compiling():
            first = int(positions[0, 0])
            if first != held - n:
                raise ValueError(
                    f"position_ids begin at {first}, but the cache holds {held - n} tokens beside the {n} rows of the "
                    "prompt. generate takes the rows for tokens that it may leave out: to go on from a cache give it "
                    "the new tokens alone, and an attention_mask over old and new ones"
                )
        given["position_ids"] = positions + n
    if mask is not None:
        _check_mask(mask)
        if mask.dim() == 4:
            given["attention_mask"] = _moved(mask, n, tokens, held)
        elif known and mask.shape[-1] != held - n + tokens:
            raise ValueError(
                f"attention_mask has {mask.shape[-1]} columns, expected {held - n + tokens}: the cache holds {held - n} "
                f"tokens beside the {n} rows of the prompt, and {tokens} are new"
            )
        else:
            given["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], n), mask], -1)
    if known:
        _check_limit(body, given.get("position_ids"), held + tokens, n)


def _moved(mask: Tensor, n: int, tokens: int, held: Any) -> Tensor:
    """A mask `batch 1 tokens columns` with the columns of the tokens `n` further right.

    With as many columns as the cache has places, it was made from a mask of the tokens alone, whose first column was
    taken for the cache's first; its rows count from what the cache holds, so what it shows too much of is behind them.
    """
    allowed, hidden = _entries(mask)
    left = mask.new_full((*mask.shape[:-1], n), allowed)
    if not isinstance(held, Tensor) and mask.shape[-1] == held - n + tokens:
        return torch.cat([left, mask], -1)
    mask = torch.cat([left, mask[..., :-n]], -1)
    columns = torch.arange(mask.shape[-1], device=mask.device)
    rows = torch.arange(tokens, device=mask.device)[:, None] + held
    return mask.masked_fill(columns > rows, hidden)


# -- both -----------------------------------------------------------------------------------------------------------------


def _check_mask(mask: Any) -> None:
    if isinstance(mask, Mapping):
        raise ValueError(
            "masks by kind of layer, made by the model around this body or for a static cache, cannot be lengthened by a "
            "prompt; with a cache, generate with a dynamic one, cache_implementation=None"
        )
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {shape}, expected (batch, tokens) or (batch, heads, tokens, columns)")


def _entries(mask: Tensor) -> tuple[Any, Any]:
    """What a mask of four dimensions says of what is seen, and of what is not."""
    return (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)


def _check_limit(body: Body, positions: Tensor | None, total: int, n: int) -> None:
    limit = body.limit
    if limit is None:
        return
    if positions is not None and not torch.compiler.is_compiling():
        total = int(positions.max()) + 1
    if total > limit:
        raise ValueError(
            f"the prompt's {n} rows and {total - n} tokens are {total} positions, but this {type(body.module).__name__} has "
            f"learned {limit}"
        )


def _mark(cache: Any, out: Any, marks: Marks) -> None:
    if cache is None:
        values = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else ()
        cache = next((v for v in values if hasattr(v, "get_seq_length")), None)
    if cache is not None:
        setattr(cache, _MARK, marks)


def _cut(out: Any, n: int, total: int) -> Any:
    """The output at the tokens' positions alone.

    Hidden states lose the rows; attentions lose them as queries and keep them as keys, so that each still sums to one.
    What a router says of all positions in a row is cut as well. What was pooled, and the cache, stay.
    """
    if isinstance(out, Tensor):
        if out.dim() == 3 and out.shape[1] == total:
            return out[:, n:]
        return out[:, :, n:] if out.dim() == 4 and out.shape[2] == total else out
    if type(out) is tuple:
        return tuple(_cut(v, n, total) for v in out)
    if isinstance(out, Mapping):
        for key in list(out.keys()):
            value = out[key]
            if key == "router_logits" and isinstance(value, tuple):
                out[key] = tuple(r.view(-1, total, r.shape[-1])[:, n:].flatten(0, 1) for r in value)  # type: ignore[index]
            elif key != "past_key_values":
                out[key] = _cut(value, n, total)  # type: ignore[index]
    return out


# -- the decoder beside an encoder ----------------------------------------------------------------------------------------


def attend_to(n: int, decoder: Body, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `base`, the forward of `decoder`, computes where `n` rows stand before the encoder's tokens: it sees them.

    Raises:
        ValueError: a mask of the encoder's tokens of another length than what the encoder gave.
    """
    given = decoder.named(args, kwargs)
    mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
    if mask is None or states is None:
        return base(*args, **kwargs)
    if states.shape[1] != mask.shape[-1] + n:
        raise ValueError(
            f"the encoder gave {states.shape[1]} positions for {mask.shape[-1]} tokens, expected {n} more, which is the "
            "prompt: encoder_outputs must be computed while the same adapters act"
        )
    left = mask.new_full((*mask.shape[:-1], n), 1 if mask.dim() == 2 else _entries(mask)[0])
    return base(**{**given, "encoder_attention_mask": torch.cat([left, mask], -1)})
