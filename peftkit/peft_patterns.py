"""peft's `rank_pattern` and `alpha_pattern`: a key matches the end of a module's path as a regular expression."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from peftkit.targets import Pattern


class PeftPatterns:
    """peft's rule: the first key, in the file's order, that matches the end of a path by whole components."""

    def __init__(self, patterns: Mapping[str, Any], default: Any):
        self.values = [*patterns.values(), default]
        self.literal = {key: i for i, key in enumerate(patterns) if re.fullmatch(r"[\w.]+", key)}
        self.regex = [(i, re.compile(rf"(.*\.)?({key})$")) for i, key in enumerate(patterns) if key not in self.literal]

    def at(self, path: str) -> Any:
        """The value for the module at `path`."""
        found = [self.literal[t] for t in _tails(path) if t in self.literal]
        found += [i for i, regex in self.regex if regex.match(path)]
        return self.values[min(found, default=-1)]


def pattern_keys(paths: Iterable[str]) -> dict[str, str]:
    """A key for each path that, by peft's rule, means none of the others: the path itself wherever that is so.

    As a regular expression the path `0` also means `a.0`, and `h.1.0` also `h.110`.
    """
    paths = tuple(paths)
    behind = {tail for path in paths for tail in list(_tails(path))[1:]}
    dots: dict[int, set[frozenset[int]]] = defaultdict(set)  # length -> where names and their ends have dots
    for path in paths:
        for tail in _tails(path):
            dots[len(tail)].add(_dots(tail))

    def alone(path: str) -> bool:
        plain = re.fullmatch(r"[\w.]+", path) is not None and path not in behind
        own = _dots(path)
        return plain and not any(other < own for other in dots[len(path)])

    return {path: path if alone(path) else "^" + re.escape(path) for path in paths}


def most_common(values: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The value that most paths have, and those of the others by their keys."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {keys[path]: own for path, own in values.items() if own != usual}


def compact(values: Mapping[str, Any]) -> Any:
    """The one value that all paths have, or a mapping with a pattern for each path alone."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else {f"^{path}": v for path, v in values.items()}


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A config's field with the full names in its patterns replaced."""

    def one(pattern: Pattern) -> Pattern:
        full = isinstance(pattern, str) and pattern.startswith("^") and pattern[1:] in names
        return "^" + names[pattern[1:]] if full else pattern  # type: ignore[index]

    if isinstance(value, Mapping):
        return {one(key): v for key, v in value.items()}
    return tuple(one(v) for v in value) if isinstance(value, tuple) else value


def _tails(path: str) -> Iterable[str]:
    """The path, and what is left of it without its first components."""
    parts = path.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _dots(text: str) -> frozenset[int]:
    return frozenset(m.start() for m in re.finditer(r"\.", text))
