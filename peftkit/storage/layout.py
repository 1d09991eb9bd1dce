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


def path_of(stem: str) -> str:
    """The path in the file of the site whose keys begin with `stem`: the inverse of `stem`, but for out_proj's."""
    return stem[len(PREFIX) : -1]


def in_file(key: str, prefix: str) -> str:
    """The key of a site's tensor as it is written where keys begin with `prefix`."""
    return prefix + key[len(PREFIX) :] if key.startswith(PREFIX) else key


def from_file(key: str, prefix: str) -> str:
    """The inverse of `in_file`."""
    return PREFIX + key[len(prefix) :] if key.startswith(prefix) else key


def module_path(site: Site) -> str:
    """The path peft knows the site by: what belongs to a MultiheadAttention is the MultiheadAttention."""
    return site.name if site.part is None and site.reader is None else site.name.rpartition(".")[0]


def target_modules(adapted: Iterable[Site], everything: Sequence[Site]) -> list[str] | str:
    """What means these modules and no others: last components where that is so, else full paths, else one regex.

    In a list, `0` would mean `a.0` too.
    """
    paths = {module_path(s) for s in adapted}
    by_last: dict[str, set[str]] = {}
    for site in everything:
        if site.part is None:
            by_last.setdefault(site.name.rpartition(".")[2], set()).add(site.name)
    lasts = {p.rpartition(".")[2] for p in paths}
    if all(by_last.get(last, set()) <= paths for last in lasts) and not any(last.isdigit() for last in lasts):
        return sorted(lasts)
    others = [n for last in lasts for n in by_last.get(last, set()) - paths]
    if any(n[at + 1 :] in paths for n in others for at in range(len(n)) if n[at] == "."):
        return "|".join(re.escape(p) for p in sorted(paths))
    return sorted(paths)


def peft_targets(stored: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which module paths the lists of an `adapter_config.json` mean, by peft's rules.

    Raises:
        ValueError, TypeError, re.error: a list of another kind than peft's.
    """
    wanted, excluded = _matcher(stored.get("target_modules")), _matcher(stored.get("exclude_modules"))
    whole = [re.compile(rf"(^|.*\.){m}($|\..*)") for m in stored.get("modules_to_save") or ()]
    in_layers = _layers(stored.get("layers_to_transform"), stored.get("layers_pattern"))
    listed = stored.get("target_modules")
    exact = frozenset() if isinstance(listed, str) or not listed else frozenset(listed)

    def means(path: str) -> bool:
        if not wanted(path) or excluded(path) or any(m.match(path) for m in whole):
            return False
        return isinstance(listed, str) or path in exact or in_layers(path)

    return means


def _layers(indices: Any, pattern: Any) -> Callable[[str], bool]:
    chosen = {indices} if isinstance(indices, int) else set(indices or ())
    if isinstance(indices, str | dict) or not all(isinstance(i, int) for i in chosen):
        raise TypeError(f"layers_to_transform is {indices!r}, expected a list of layer indices")
    if not chosen:
        return lambda path: True
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    regexes = [re.compile(rf"(?:^|.*?\.){p}\.(\d+)\.") for p in patterns if p] or [re.compile(r".*?\.[^.]*\.(\d+)\.")]

    def in_layers(path: str) -> bool:
        found = next((m for r in regexes if (m := r.match(path))), None)
        return found is not None and int(found[1]) in chosen

    return in_layers


def _matcher(value: object) -> Callable[[str], bool]:
    if not value:
        return lambda path: False
    if isinstance(value, str):
        regex = re.compile(value)
        return lambda path: regex.fullmatch(path) is not None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"a list of module names or one regular expression was expected, not {value!r}")
    names = frozenset(value)

    def matches(path: str) -> bool:
        start = 0
        while True:
            if path[start:] in names:
                return True
            start = path.find(".", start) + 1
            if not start:
                return False

    return matches
