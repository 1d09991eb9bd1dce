"""Bodies: the modules that turn token ids into hidden states, and take embeddings in place of the ids.

LlamaModel, GPT2Model, BertModel, the stacks of T5: what stands between the ids and a head. They are known by their
forward alone, which takes `inputs_embeds` and `attention_mask`, and by the embedding they own.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftkit.holder import original_class
from peftkit.hosts import ModuleRef
from peftkit.sites import Site

# states that a forward goes on from, beside `past_key_values`: whether they hold a prompt already cannot be asked
_OTHER_CACHES = frozenset({"cache_params", "mems", "past_buckets_states", "state"})
_POSITIONS = re.compile(r"(wpe|embed_positions|positions?_embeddings?)")


@functools.cache
def _forward_names(cls: type[nn.Module]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what the module's own forward takes, in order, without `*args` and `**kwargs`."""
    return _forward_names(original_class(module))


def embedding_of(module: nn.Module) -> nn.Embedding | None:
    """The embedding of its tokens: what it says itself, or the only one among its children; None where neither is."""
    said = getattr(module, "get_input_embeddings", None)
    if said is not None:
        try:
            found = said()
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Embedding):
            return found
    own = [m for m in module._modules.values() if isinstance(m, nn.Embedding)]
    return own[0] if len(own) == 1 else None


class Body:
    """A body and what is known of it for good.

    Attributes:
        names: what its forward takes.
        ids: of these the token ids.
        limit: how many positions it has learned; None where positions are computed.
        counts_places: whether places in a row count beside positions: windows, recurrent states, biases by distance.
    """

    def __init__(self, module: nn.Module):
        self._ref = ModuleRef(module)
        self.names = forward_names(module)
        self.ids = "input_ids" if "input_ids" in self.names else self.names[0]
        self.limit = position_limit(module)
        self.counts_places = _counts_places(getattr(module, "config", None))

    @property
    def module(self) -> nn.Module:
        module = self._ref()
        assert module is not None
        return module

    @property
    def embedding(self) -> nn.Embedding:
        """That of its tokens as it is now: it may have been replaced."""
        found = embedding_of(self.module)
        assert found is not None
        return found

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, each by its name."""
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)


def _counts_places(config: Any) -> bool:
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    recurrent = any(word in name for name in getattr(config, "__dict__", ()) for word in ("mamba", "conv_L_cache"))
    return bool(kinds - {"full_attention", "attention"} or window or alibi or recurrent)


def why_no_body(module: nn.Module) -> str | None:
    """Why nothing can be put before the tokens of `module`, as the end of a sentence; None where it can."""
    names = forward_names(module)
    for name, why in (
        ("inputs_embeds", "rows can only be put before the embeddings of a model that takes them in place of ids"),
        ("attention_mask", "what it computes is not said by the tokens alone"),
    ):
        if name not in names:
            return f"it takes no {name}: {why}"
    if "per_layer_inputs" in names:
        return "it looks its ids up in a second table, which has no rows for a prompt"
    if any(getattr(m, "token_dropout", False) is True for m in module.modules()):
        return "it changes embeddings by their ids, which the rows of a prompt do not have"
    if state := _OTHER_CACHES.intersection(names):
        return f"it keeps its state in {min(state)}, of which it cannot be told whether the prompt is in it"
    if embedding_of(module) is None:
        return "it has no get_input_embeddings() and not exactly one nn.Embedding of its own, so its tokens' is unknown"
    for name, inner in module.named_modules():
        if inner is not module and why_no_body(inner) is None:
            return f"it wraps {name!r}, which turns the ids into hidden states; take that"
    return None


def bodies_of(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The bodies of `model` among all its `sites` whose embedding is the model's, if the model names one."""
    bodies = [s for s in sites if s.part is None and why_no_body(s.module) is None]
    said = embedding_of(model)
    if said is None or len(bodies) < 2:
        return bodies
    of_model = [s for s in bodies if _same(embedding_of(s.module), said)]
    return of_model or bodies


def _same(one: nn.Embedding | None, other: nn.Embedding) -> bool:
    """The stacks of an encoder-decoder have embeddings of their own that share one weight."""
    return one is other or (one is not None and one.weight is other.weight)


def decoder_beside(encoder: Site, sites: Sequence[Site]) -> Site | None:
    """The decoder that attends to what `encoder` computes, by their names: `x.encoder` and `x.decoder`."""
    for name in encoder.names:
        path, _, last = name.rpartition(".")
        if last == "encoder":
            for site in sites:
                if (f"{path}.decoder" if path else "decoder") in site.names and (
                    "encoder_hidden_states" in forward_names(site.module)
                ):
                    return site
    return None


def position_limit(body: nn.Module) -> int | None:
    """How many positions it has learned; None where positions are computed and there is no limit."""
    limits = []
    near = [(k, m) for k, m in body._modules.items() if m is not None]
    near += [(k, m) for _, child in near for k, m in child._modules.items() if m is not None]
    for name, module in near:
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
            # BART and OPT leave the first rows unused, RoBERTa those up to the padding's
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - unused)
    return min(limits, default=None)


def is_causal(body: nn.Module) -> bool:
    """Whether its tokens see none behind them."""
    return any(getattr(m, "is_causal", False) is True for m in body.modules())
