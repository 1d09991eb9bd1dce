"""peft's names: where in the file the tensors of a site are, and which modules a config's lists mean.

A key is `base_model.model.<site>.<tensor>`. `nn.MultiheadAttention` is the exception: its in_proj has the module's own
name, and its out_proj lies under `base_layer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peftkit.sites import Site

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
README = "README.md"


def stem(site: Site) -> str:
    """What the keys of a site begin with, up to and with the last dot."""
    name = site.name
    if site.part == "in_proj":
        name = name.rpartition(".")[0]
    elif site.part is None and site.reader is not None:
        name = re.sub(r"(^|\.)out_proj$", r"\1base_layer.out_proj", name)
    return f"{PREFIX}{name}." if name else PREFIX


def module_path(site: Site) -> str:
    """The name peft knows the site by: a part of a MultiheadAttention is the MultiheadAttention."""
    return site.name if site.part is None else site.name.rpartition(".")[0]


def target_modules(adapted: Iterable[Site], everything: Sequence[Site]) -> list[str]:
    """Names that mean these modules and no others: last components where that is so, else full paths."""
    paths = {module_path(s) for s in adapted if not (s.reader is not None and s.part is None)}
    by_last: dict[str, set[str]] = {}
    for site in everything:
        if site.part is None:
            by_last.setdefault(site.name.rpartition(".")[2], set()).add(site.name)
    lasts = {p.rpartition(".")[2] for p in paths}
    if all(by_last.get(last, set()) <= paths for last in lasts) and not any(last.isdigit() for last in lasts):
        return sorted(lasts)
    return sorted(paths)


def peft_targets(stored: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which module paths the lists of an `adapter_config.json` mean, by peft's rules."""
    wanted, excluded = _matcher(stored.get("target_modules")), _matcher(stored.get("exclude_modules"))
    layers, pattern = stored.get("layers_to_transform"), stored.get("layers_pattern")
    indices = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])

    def in_layers(name: str) -> bool:
        if indices is None:
            return True
        found = None
        for p in patterns:
            found = found or re.match(rf".*\.{p}\.(\d+)\.", name)
        if not patterns:
            found = re.match(r".*\.[^.]*\.(\d+)\.", name)
        return found is not None and int(found[1]) in indices

    return lambda name: wanted(name) and not excluded(name) and in_layers(name)


def _matcher(value: object) -> Callable[[str], bool]:
    if not value:
        return lambda name: False
    if isinstance(value, str):
        regex = re.compile(value)
        return lambda name: regex.fullmatch(name) is not None
    names = frozenset(value)  # type: ignore[call-overload]

    def matches(name: str) -> bool:
        start = 0
        while True:
            if name[start:] in names:
                return True
            start = name.find(".", start) + 1
            if not start:
                return False

    return matches
