"""Adapters that put keys and values in front, which of them act on a module, and what shows that they did."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.attention.finding import Kind
from peftkit.holder import Graft
from peftkit.hosts import ModuleRef
from peftkit.method import Adapter
from peftkit.sites import Site

PAST = "peftkit_past"  # the keyword by which T5's attention hands on what its implementation needs: where queries begin


class KeyValues(Adapter):
    """An adapter whose keys and values stand in front of those of the attention it hangs on.

    Attributes:
        where: the site's name.
        kind: how the module computes attention.
        length: how many columns it adds.
        shifts: tokens stand behind the prefix, at positions `length` and up.
        bias: the module with the table of the relative position bias that this attention adds, where it is one of T5's.
    """

    def __init__(self, site: Site, kind: Kind, length: int, shifts: bool):
        super().__init__()
        self.where, self.kind, self.length, self.shifts = site.name, kind, length, shifts
        self.bias: ModuleRef | None = None
        self.module = ModuleRef(site.module)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Key and value, `(kv_heads length head_dim)`."""
        raise NotImplementedError


def acting(graft: Graft) -> list[KeyValues]:
    """The adapters that put keys and values in front at this graft in this thread, in order of activation."""
    return [a for a in graft.acting(graft.switch.acting()) if isinstance(a, KeyValues)]


class _Thread(threading.local):
    """What one thread has seen.

    Attributes:
        used: ids of adapters whose keys and values were attended to.
        into: while recording, the keys and values that an adapter's attention saw, by the adapter's id.
    """

    def __init__(self) -> None:
        self.used: set[int] = set()
        self.into: dict[int, tuple[Tensor, Tensor]] | None = None


thread = _Thread()


@contextlib.contextmanager
def recording() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within the block, in this thread, no prefix is put in front and no position shifted; instead the keys and values,
    `(… kv_heads tokens head_dim)`, that each acting adapter's attention attends to are kept by the adapter's id.
    """
    before, thread.into = thread.into, {}
    try:
        yield thread.into
    finally:
        thread.into = before


def is_recording() -> bool:
    """Whether this thread is within `recording()`."""
    return not torch.compiler.is_compiling() and thread.into is not None


def note(prefixes: Sequence[KeyValues], key: Tensor, value: Tensor) -> bool:
    """Remember that these were attended to; True where a recorder took the keys and values in their place."""
    if torch.compiler.is_compiling():
        return False
    thread.used.update(id(p) for p in prefixes)
    if thread.into is None:
        return False
    thread.into.update({id(p): (key.detach(), value.detach()) for p in prefixes})
    return True


# -- putting in front -----------------------------------------------------------------------------------------------------


def in_front(prefixes: Sequence[KeyValues], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`key`, `value`: (… heads tokens head_dim) with the prefixes before the tokens, in their dtype.

    Raises:
        RuntimeError: the heads or their width are not those of the prefix.
    """
    made = [p.prefix() for p in prefixes]
    keys = [_fitted(p, pair[0], key, "keys") for p, pair in zip(prefixes, made, strict=True)]
    values = [_fitted(p, pair[1], value, "values") for p, pair in zip(prefixes, made, strict=True)]
    return torch.cat([*keys, key], -2), torch.cat([*values, value], -2)


def _fitted(adapter: KeyValues, prefix: Tensor, tokens: Tensor, what: str) -> Tensor:
    heads, (own, _, width) = tokens.shape[-3], prefix.shape
    if heads % own or tokens.shape[-1] != width:
        raise RuntimeError(
            f"{adapter.where!r} attends to {what} of {heads} heads of {tokens.shape[-1]}, but its prefix has {own} of "
            f"{width}; attach with kv_heads={heads}, head_dim={tokens.shape[-1]}"
        )
    prefix = prefix.to(tokens)
    if heads != own:  # grouped heads that the module repeats itself
        prefix = prefix.repeat_interleave(heads // own, 0)
    return prefix.expand(*tokens.shape[:-3], -1, -1, -1)


def length_of(prefixes: Sequence[KeyValues]) -> int:
    """How many columns they add together."""
    return sum(p.length for p in prefixes)


def widened(mask: Tensor, length: int, tokens: int) -> Tensor:
    """A mask over `tokens` keys, boolean (True attends) or additive, with `length` allowed columns before them."""
    if mask.shape[-1] != tokens:
        mask = mask.expand(*mask.shape[:-1], tokens)
    return F.pad(mask, (length, 0), value=1.0 if mask.dtype == torch.bool else 0.0)


def causal(query: Tensor, key: Tensor) -> Tensor:
    """The mask that `is_causal` stands for, `(queries tokens)`: torch aligns it at the upper left."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
