"""Prefixes in models of transformers 5, which call attention through an interface.

A modelling file asks the interface for a function by the name in `self.config._attn_implementation`. An attention
module that carries prefixes sees its config through `Seen`, which names ours while a prefix acts; ours puts the
prefixes in front and calls the one that the config itself names. The config is not touched, so nothing else in the
model, neither masks nor caches nor saving, can tell, and another implementation may be set at any time.

Our name is registered when the first prefix is attached, and again where a model that carries one is unpickled.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.attention.acting import PAST, KeyValues, acting, causal, in_front, length_of, note, widened
from peftkit.attention.finding import INTERFACE
from peftkit.holder import Graft, graft_of, original_class

_NAME = "peftkit_prefix"
_FLASH = ("flash", "paged")


class Seen:
    """A config as an attention with prefixes sees it: itself, but for the implementation while one acts."""

    def __init__(self, config: Any, graft: Graft, file: str, users: int):
        found = importlib.import_module(file)
        interface = getattr(found, INTERFACE)
        # a dict shared by all instances of the interface, whose `register` is this assignment
        interface._global_mapping[_NAME] = _attend
        vars(self).update(config=config, graft=graft, file=file, users=users, modelling=found, interface=interface)

    @property
    def _attn_implementation(self) -> str:
        own = vars(self)
        return _NAME if acting(own["graft"]) else own["config"]._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["config"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        own = vars(self)
        return Seen, (own["config"], own["graft"], own["file"], own["users"])


def let_see(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Give grafted attentions that call the interface sight of it, once more for every adapter; returns them."""
    found, made = [], []
    for module in modules:
        graft = graft_of(module)
        config = module.__dict__.get("config")
        if graft is None or config is None:
            continue
        count = sum(isinstance(a, KeyValues) and a.kind == "interface" for a in graft._modules.values())
        if isinstance(config, Seen):
            if count > vars(config)["users"]:
                vars(config)["users"] = count
                found.append(module)
        elif count:
            made.append((module, Seen(config, graft, _caller(module).__globals__["__name__"], count)))
    for module, seen in made:  # nothing can fail any more
        module.__dict__["config"] = seen
    return [*found, *(module for module, _ in made)]


def give_back(modules: Iterable[nn.Module]) -> None:
    """The inverse for one adapter: with the last one, the module has its config again."""
    for module in modules:
        seen = module.__dict__.get("config")
        if isinstance(seen, Seen):
            vars(seen)["users"] -= 1
            if not vars(seen)["users"]:
                module.__dict__["config"] = vars(seen)["config"]


class _Plain:
    """A module as an implementation sees it that asks for the name it was called by."""

    def __init__(self, module: nn.Module, config: Any):
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """The attention that the module's own config names, with the acting prefixes in front.

    `key`, `value`: (batch kv_heads tokens head_dim), behind cache and rotation.
    """
    seen, past = vars(module.config), kwargs.pop(PAST, 0)
    name = seen["config"]._attn_implementation
    function = seen["interface"].get_interface(name, _eager(module, seen["modelling"]))
    prefixes = acting(seen["graft"])
    flash = name is not None and "flash" in name
    called = _Plain(module, seen["config"]) if flash else module
    if note(prefixes, key, value) or not prefixes:
        return function(called, query, key, value, attention_mask, *args, **kwargs)
    _check(prefixes, name, attention_mask, key, kwargs)
    length, tokens = length_of(prefixes), key.shape[-2]
    if attention_mask is None and not flash and name != "eager" and query.shape[-2] > 1:
        hint = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if hint is None else hint:
            attention_mask = causal(query, key)[None, None]
    if attention_mask is not None:
        attention_mask = widened(attention_mask, length, tokens)
    if not flash:  # whose own alignment, at the lower right, is the right one with a prefix
        kwargs["is_causal"] = False
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = torch.cat([*(_bias(p, bias, past) for p in prefixes), bias], -1)
    key, value = in_front(prefixes, key, value)
    found = function(called, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(found, tuple) and len(found) > 1 and isinstance(found[1], Tensor) and found[1].dim() == 4:
        return (found[0], found[1][..., length:], *found[2:])  # weights of the tokens alone
    return found


def _caller(module: nn.Module) -> Any:
    """The function that asks the interface: the forward of the module's class, or of the one it derives from."""
    forwards = [inspect.unwrap(vars(c)["forward"]) for c in original_class(module).__mro__ if "forward" in vars(c)]
    return next((f for f in forwards if INTERFACE in getattr(f, "__globals__", ())), forwards[0])


def _eager(module: nn.Module, modelling: Any) -> Any:
    names = _caller(module).__code__.co_names
    return getattr(modelling, next((n for n in names if n.endswith("eager_attention_forward")), ""), None)


def _check(prefixes: Sequence[KeyValues], name: str | None, mask: Any, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse what would evict the prefix, or give it to one of several sequences only."""
    where = prefixes[0].where
    if mask is not None and not isinstance(mask, Tensor):
        raise RuntimeError(
            f"{where!r} masks by a {type(mask).__name__}, to which no prefix can be added; set_attn_implementation('sdpa')"
        )
    if kwargs.get("cache") is not None:
        raise RuntimeError(f"{where!r} attends to a paged cache of many requests, in which a prefix has no place")
    if name is None or not any(kind in name for kind in _FLASH):
        return
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[-2] + length_of(prefixes) > window:
        raise RuntimeError(
            f"{where!r} attends within a sliding window of {window}, out of which {name} would drop the prefix; "
            "set_attn_implementation('sdpa')"
        )
    if any(kwargs.get(k) is not None for k in ("cu_seq_lens_q", "cu_seq_lens_k")):
        raise RuntimeError(
            f"{where!r} attends to packed sequences, each of which would need the prefix; pad them, or "
            "set_attn_implementation('sdpa') and give position_ids"
        )


def _bias(adapter: KeyValues, bias: Tensor, past: Any) -> Tensor:
    """The position bias of a prefix's columns, beside `bias`: (1 heads queries tokens).

    A prefix that tokens stand behind is at positions −length … −1 before the first of them; else it has none.
    """
    source: Any = adapter.bias() if adapter.bias is not None else None
    if source is None or not adapter.shifts:
        return bias.new_zeros(*bias.shape[:-1], adapter.length)
    at = torch.arange(bias.shape[-2], device=bias.device)[:, None] + past
    before = torch.arange(-adapter.length, 0, device=bias.device)[None]
    settings = {
        "bidirectional": not source.is_decoder,
        "num_buckets": source.relative_attention_num_buckets,
        "max_distance": source.relative_attention_max_distance,
    }
    takes = inspect.signature(source._relative_position_bucket).parameters  # UMT5's takes none of them
    buckets = source._relative_position_bucket(before - at, **{k: v for k, v in settings.items() if k in takes})
    found = F.embedding(buckets, source.relative_attention_bias.weight)
    return found.permute(2, 0, 1)[None].to(bias).expand(bias.shape[0], -1, -1, -1)
