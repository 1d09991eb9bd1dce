"""What peft's `adapter_config.json` says of a prefix: `peft_type` PREFIX_TUNING.

One tensor holds all layers, so the file says nothing of modules: it means every layer of a model, or of an
encoder-decoder model the decoder's self-attention, with positions shifted. Anything else peft would misread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from peftkit.attention import is_cross
from peftkit.sites import Site

PEFT_TYPE = "PREFIX_TUNING"
PACKED = "prompt_embeddings"
_DECODER = re.compile(r"(.*\.)?decoder\..*")
_CROSS_NAMES = re.compile(r".*(cross|[Ee]nc(oder)?_?([Dd]ec|[Aa]ttn)).*")


def settings(config: Any, adapters: Mapping[str, Any]) -> dict[str, Any] | None:
    """peft's fields for these adapters by module path; None where peft would not read them as the same function."""
    first = next(iter(adapters.values()))
    if why_peft_differs(adapters) is not None:
        return None
    base, sizes = first.base_config, {a.sizes for a in adapters.values()}
    if base is None or len(sizes) != 1 or first.sizes.key != first.sizes.value or not config.shift_positions:
        return None
    if any(a.kind != "interface" or is_cross(Site(path, a.module())) for path, a in adapters.items()):
        return None
    both = bool(getattr(base, "is_encoder_decoder", False))
    layers = getattr(base if both else base.get_text_config(), "num_hidden_layers", None)
    deep = next((n for k in ("num_decoder_layers", "decoder_layers") if both and (n := getattr(base, k, None))), layers)
    if not len(adapters) == layers == deep or (both and not all(_DECODER.fullmatch(path) for path in adapters)):
        return None
    if not _shared_are_equal(adapters):
        return None
    width = first.sizes.heads * first.sizes.key
    return {
        "encoder_hidden_size": config.reparametrize or width,
        "init_weights": "zero" if config.init == "zero" else None,
        "num_attention_heads": first.sizes.heads,
        "num_layers": layers,
        "num_transformer_submodules": 2 if both else 1,
        "num_virtual_tokens": config.length,
        "prefix_projection": False,
        "token_dim": width,
    }


def why_peft_differs(adapters: Mapping[str, Any]) -> str | None:
    """Why peft's prefix, which is part of a cache, is another function than one in front of attention; None where not."""
    config = next(iter(adapters.values())).base_config
    if getattr(config, "alibi", False):
        return "there the prefix has distances of its own (ALiBi), which it has not in front of attention"
    if getattr(config, "attn_temperature_tuning", False):
        return "there the prefix counts for the temperature of attention"
    return None


def places(adapters: Mapping[str, Any]) -> list[int]:
    """The place of each adapter's pair of key and value in peft's tensor: its own, in layers' order.

    Not so in an encoder-decoder model: peft writes the pairs of all L layers twice in a row and gives each layer two, of
    which the second, for cross-attention, is dropped. So layer l computes with pair 2l mod L, and where L is even the
    odd pairs with none.
    """
    count, first = len(adapters), next(iter(adapters.values()))
    step = 2 if getattr(first.base_config, "is_encoder_decoder", False) else 1
    return [step * layer % count for layer in range(count)]


def _shared_are_equal(adapters: Mapping[str, Any]) -> bool:
    """Whether layers that peft gives one pair hold the same values."""
    found: dict[int, Any] = {}
    return all(
        all(torch.equal(a, b) for a, b in zip(found.setdefault(place, adapter).prefix(), adapter.prefix(), strict=True))
        for place, adapter in zip(places(adapters), adapters.values(), strict=True)
    )


def read_config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the config that a file of peft's describes.

    Raises:
        ValueError: no `num_virtual_tokens`.
    """
    length = stored.get("num_virtual_tokens")
    if type(length) is not int:
        raise ValueError(f"num_virtual_tokens is {length!r}, expected a number")
    found: dict[str, Any] = {"length": length, "init": "zero" if stored.get("init_weights") == "zero" else "normal"}
    found["shift_positions"] = bool(stored.get("shift_positions", True))  # False is in files of our own type alone
    if stored.get("num_transformer_submodules") == 2 or stored.get("task_type") == "SEQ_2_SEQ_LM":
        found |= {"targets": (_DECODER,), "exclude": (_CROSS_NAMES,)}
    return found
