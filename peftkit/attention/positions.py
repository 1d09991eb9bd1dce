"""Where the positions of tokens enter a model, and shifting them by the length of a prefix.

Rotary embeddings and tables of learned positions are modules that are given position ids; they get an adapter of their
own that adds to the ids. T5 adds a bias by distance inside attention, which `interface.py` extends.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.attention.acting import KeyValues, is_recording
from peftkit.attention.finding import kind_of
from peftkit.holder import original_class
from peftkit.hosts import ModuleRef
from peftkit.method import Adapter
from peftkit.sites import Site

_TABLE = re.compile(
    r"wpe|(.*_)?pos(ition(al|s)?)?_?(ids_)?(emb|embed|embedding|embeddings|encoder)|embed_positions?", re.I
)
_CROSS = re.compile(r"cross|enc(oder)?_?(dec|attn|attention)", re.I)


def is_cross(site: Site) -> bool:
    """Whether it attends to what an encoder says, judged by its own name or its flag."""
    flag = getattr(site.module, "is_cross_attention", None)
    own = [c for c in site.name.split(".")[-3:] if not c.isdigit()]
    return flag is True or any(_CROSS.search(c) for c in own)


def position_sites(everything: Sequence[Site], attentions: Sequence[Site]) -> list[Site]:
    """The modules that give positions to the tokens which `attentions`, of all sites of a model, attend to.

    A module gives positions to all that lies in the nearest block around it that holds an attention.
    """
    names = [s.name for s in everything if s.part is None and kind_of(s.module) is not None]
    own = [s.name for s in attentions if not is_cross(s) and not _has_all_positions(s.module)]
    found = []
    for site in everything:
        if site.part is not None or not _takes_positions(site):
            continue
        block = site.name
        while block and not any(_within(name, block) for name in names):
            block = block.rpartition(".")[0]
        if any(_within(name, block) for name in own):
            found.append(site)
    return found


def _within(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(block + ".")


def _has_all_positions(module: nn.Module) -> bool:
    """Whether it attends to an image or a recording, whose patches or frames have all positions that there are."""
    config = getattr(module, "config", None)
    recording = getattr(config, "max_source_positions", None) is not None and not getattr(module, "is_decoder", True)
    return recording or any(getattr(config, size, None) is not None for size in ("image_size", "patch_size"))


def _takes_positions(site: Site) -> bool:
    cls = original_class(site.module)
    names = inspect.signature(cls.forward).parameters
    if isinstance(site.module, nn.Embedding):
        return bool(_TABLE.fullmatch(site.name.rpartition(".")[2]))
    if "rotary" in cls.__name__.lower():
        return "position_ids" in names
    return "position" in cls.__name__.lower() and "past_key_values_length" in names


class PositionShift(Adapter):
    """Adds `length` to the positions that a module is given, explicit ones as well.

    Raises:
        ValueError: the table has too few positions for the prefix.
    """

    beside = True

    def __init__(self, site: Site, length: int):
        super().__init__()
        self.where, self.length = site.name, length
        module = site.module
        parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
        names = [p.name for p in parameters]
        plain = isinstance(module, nn.Embedding) and "position_ids" not in names
        plain = plain and "past_key_values_length" not in names
        self.ids = names[0] if plain else "position_ids"
        self.names = names
        self.padding = getattr(module, "padding_idx", None) if plain else None
        self.limit: int | None = None
        if isinstance(module, nn.Embedding):
            self.limit = module.num_embeddings - int(getattr(module, "offset", 0))
            if length >= self.limit:
                raise ValueError(
                    f"length={length}: {site.name!r} has {self.limit} positions, so none would be left for tokens; give a "
                    "shorter prefix, or shift_positions=False"
                )

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            return base(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids = given.get(self.ids)
        if ids is not None:
            given[self.ids] = self._shifted(ids)
        elif "past_key_values_length" not in self.names:
            raise RuntimeError(
                f"{self.where!r} was called without position_ids, which stand behind a prefix; give them"
            )
        else:
            past = given.get("past_key_values_length")
            past = 0 if past is None else past
            given["past_key_values_length"] = past + self.length
            first = next(x for key in (self.names[0], "inputs_embeds") if (x := given.get(key)) is not None)
            tokens = first[1] if isinstance(first, tuple) else first.shape[1]  # some are given a size alone
            self._check(tokens + (past if isinstance(past, int) else 0))
        return base(**given)

    def _shifted(self, ids: Tensor) -> Tensor:
        shifted = ids + self.length
        if self.limit is None:
            return shifted
        on_host = ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel()
        self._check(int(ids.max()) + 1 if on_host else ids.shape[-1])
        padded = ids < 0 if self.padding is None else ids == self.padding  # they have no position
        return torch.where(padded, ids, shifted)

    def _check(self, tokens: int) -> None:
        if self.limit is not None and tokens + self.length > self.limit:
            raise ValueError(
                f"{tokens} tokens behind a prefix of {self.length} are more than the {self.limit} positions of "
                f"{self.where!r}; give fewer tokens, a shorter prefix, or attach it with shift_positions=False"
            )

    def reset_parameters(self) -> None:
        """It has none."""

    def extra_repr(self) -> str:
        return f"positions + {self.length}"


def find_biases(everything: Sequence[Site], adapters: Mapping[str, KeyValues]) -> None:
    """Tell the prefixes in T5's attentions, by site name, where the relative position bias comes from that they add:
    their own module's table, or that of the first block of their stack.
    """
    table: nn.Module | None = None
    for site in everything:
        if isinstance(getattr(site.module, "relative_attention_bias", None), nn.Embedding):
            table = site.module
        if table is None or not hasattr(table, "_relative_position_bucket"):
            continue
        if site.part is None and site.name in adapters and hasattr(site.module, "is_decoder") and not is_cross(site):
            adapters[site.name].bias = ModuleRef(table)
