"""Which modules compute attention, by what their code calls, and the sizes of their keys and values."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import nn

from peftkit.holder import original_class
from peftkit.sites import Site
from peftkit.targets import TargetError

Kind = Literal["interface", "call", "multihead"]

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what transformers' modelling files call attention through
_PRETRAINED = "transformers.modeling_utils"  # whose base class names the interface without attending
_KEYS = ("k_proj", "key", "k", "key_proj", "k_lin", "to_k", "wk", "lin_k", "k_head")
_FUSED = ("qkv", "qkv_proj", "in_proj", "c_attn", "query_key_value", "Wqkv", "wqkv", "to_qkv", "qkv_linear")
_HEAD_DIMS = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head", "d_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_WIDTHS = ("embed_dim", "hidden_size", "d_model", "all_head_size", "dim", "n_embd")


@dataclass(frozen=True)
class Sizes:
    """Of the keys and values that an attention attends to, before grouped heads are repeated."""

    heads: int
    key: int
    value: int


def kind_of(module: nn.Module) -> Kind | None:
    """How the module computes attention; None where it does not, or in a way that cannot be reached.

    interface: through transformers' attention interface. multihead: it is an `nn.MultiheadAttention`.
    call: its code calls `F.scaled_dot_product_attention`.
    """
    if isinstance(module, nn.MultiheadAttention):
        return "multihead"
    used = _names_used(original_class(module))
    if INTERFACE in used and hasattr(module, "config"):
        return "interface"
    return "call" if "scaled_dot_product_attention" in used else None


def why_no_attention(site: Site) -> str | None:
    """Why keys and values cannot be put in front of those at `site`; None where they can."""
    module = site.module
    name = original_class(module).__name__
    if site.part is not None:
        return "it is a weight, not an attention; name the module that holds it"
    if kind_of(module) is None:
        if _looks_like_attention(module):
            return (
                f"this {name} computes attention by products of its own, which cannot be reached: neither through "
                "transformers' attention interface nor by F.scaled_dot_product_attention; let its "
                "forward call F.scaled_dot_product_attention"
            )
        return f"it is a {name}, no attention"
    if _chooses(module):
        return (
            f"this {name} leaves out tokens by an index that it asks for with implementations it knows by name alone, and "
            "would attend to all of them with a prefix"
        )
    inside = next((n for n, m in module.named_modules() if m is not module and kind_of(m) is not None), None)
    return None if inside is None else f"the attention that it holds, {inside!r}, is the one to name"


def unreachable(site: Site) -> bool:
    """Whether it is an attention that `why_no_attention` cannot but refuse."""
    if site.part is not None:
        return False
    return _chooses(site.module) or (kind_of(site.module) is None and _looks_like_attention(site.module))


def _chooses(module: nn.Module) -> bool:
    """Whether it is a sparse attention of DeepSeek's kind."""
    return "indexer" in module._modules


def _looks_like_attention(module: nn.Module) -> bool:
    """By its class's name and the projections it owns."""
    own = {**module._modules, **module._parameters}
    return bool(re.search(r"attention|attn", original_class(module).__name__, re.I)) and any(
        name in own for name in (*_KEYS, *_FUSED)
    )


@functools.cache
def _names_used(cls: type[nn.Module]) -> frozenset[str]:
    """Global names and attributes in the code of the class's methods."""
    found: set[str] = set()
    for c in cls.__mro__:
        if c.__module__.startswith("torch.nn.modules") or c.__module__ == _PRETRAINED or c is object:
            continue
        for value in vars(c).values():
            function: Any = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if code is not None:
                for one in _codes(code):
                    found.update(one.co_names)
    return frozenset(found)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def sizes_of(site: Site, heads: int | None = None, head_dim: int | None = None) -> Sizes:
    """The sizes of the keys and values at `site`; what the caller gives is taken as it is.

    Raises:
        TargetError: the module does not tell them.
    """
    module: Any = site.module
    if isinstance(module, nn.MultiheadAttention):
        return Sizes(module.num_heads, module.head_dim, module.head_dim)
    config = getattr(module, "config", None)
    holders = (module,) if config is None else (module, config)
    query_heads = _first(holders, _HEADS)
    if head_dim is None:
        head_dim = _first(holders, _HEAD_DIMS)
        width = _first(holders, _WIDTHS)
        if head_dim is None and width and query_heads:
            head_dim = width // query_heads
    if heads is None and head_dim:
        projection = next((m for n in _KEYS if (m := module._modules.get(n)) is not None), None)
        columns = getattr(projection, "out_features", None) or getattr(projection, "nf", None)
        heads = columns // head_dim if columns else _first(holders, _KV_HEADS) or query_heads
    if not heads or not head_dim:
        raise TargetError(
            f"{site.name!r}: the sizes of its keys are not to be read off this {original_class(module).__name__}; "
            "give kv_heads= and head_dim="
        )
    return Sizes(heads, head_dim, _first((module,), ("v_head_dim",)) or head_dim)


def _first(holders: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if type(value) is int:
                return value
    return None
