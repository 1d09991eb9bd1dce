"""Which modules: presets, patterns and layer ranges, turned into sites.

A pattern is one of

- a dotted suffix by whole components: ``"q_proj"``, ``"self_attn.q_proj"`` (``"proj"`` matches neither);
- a glob over components, also a suffix: ``"layers.*.mlp.up_proj"``; ``*`` stays inside one component, ``**`` does not;
- ``"^"`` and a full name, for that module alone: ``"^layers.0.q_proj"``;
- a compiled regular expression, matched in full.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

from peftkit.sites import Site, layer_index

Pattern = str | re.Pattern[str]
Predicate = Callable[[str, nn.Module], bool]
Targets = Pattern | Predicate | Sequence[Pattern]
T = TypeVar("T")

PRESETS = ("all-linear", "attention", "mlp")

_ATTENTION = re.compile(r".*(attn|attention).*", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|ff|fc[12]|linear[12]|feed_?forward.*|.*dense_?relu_?dense|intermediate|experts?|lin[12]", re.I
)
_HEADS = frozenset({"lm_head", "head", "classifier", "score", "embed_out", "output_projection", "fc"})


class TargetError(ValueError):
    """A name, pattern or layer that matches nothing, or nothing that the method can be attached to."""


def _is_glob(pattern: str) -> bool:
    return any(c in pattern for c in "*?[")


def _glob_regex(pattern: str) -> re.Pattern[str]:
    out = []
    for token in re.split(r"(\*\*|\*|\?|\[[^]]*\])", pattern):
        if token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^.]*")
        elif token == "?":
            out.append("[^.]")
        elif token.startswith("[") and token.endswith("]"):
            out.append("[" + token[1:-1].replace("!", "^", 1) + "]" if token[1:2] == "!" else token)
        else:
            out.append(re.escape(token))
    return re.compile(r"(?:.*\.)?" + "".join(out))


class Patterns:
    """A set of patterns, asked for the ones that match a name in time that does not grow with their number."""

    def __init__(self, patterns: Iterable[Pattern]):
        self.patterns = tuple(patterns)
        self._exact: dict[str, Pattern] = {}
        self._suffix: dict[str, Pattern] = {}
        self._regex: list[tuple[Pattern, re.Pattern[str]]] = []
        for p in self.patterns:
            if isinstance(p, re.Pattern):
                self._regex.append((p, p))
            elif not isinstance(p, str) or not p:
                raise TargetError(f"a pattern is a non-empty string or a compiled regular expression, not {p!r}")
            elif p.startswith("^"):
                self._exact[p[1:]] = p
            elif _is_glob(p):
                self._regex.append((p, _glob_regex(p)))
            else:
                self._suffix[p] = p

    def matching(self, name: str) -> list[Pattern]:
        """The patterns that match `name`."""
        hits = []
        if self._exact and name in self._exact:
            hits.append(self._exact[name])
        if self._suffix:
            start = 0
            while True:
                hit = self._suffix.get(name[start:] if start else name)
                if hit is not None:
                    hits.append(hit)
                start = name.find(".", start) + 1
                if not start:
                    break
        for p, regex in self._regex:
            if regex.fullmatch(name):
                hits.append(p)
        return hits


def nearest(pattern: object, names: Iterable[str], *, has: str = "the model has") -> str:
    """`"; did you mean 'q_proj'?"`, or some of `names` where nothing is near; `has` says whose they are."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else str(pattern)
    depth = text.count(".") + 1
    tails = sorted({".".join(n.split(".")[-depth:]) for n in names if n})
    close = difflib.get_close_matches(text.lstrip("^"), tails, n=3, cutoff=0.5)
    if not close:
        return f"; {has} {', '.join(map(repr, tails[:8]))}{' …' if len(tails) > 8 else ''}" if tails else ""
    return "; did you mean " + " or ".join(map(repr, close)) + "?"


def heads(model: nn.Module) -> set[int]:
    """Ids of the output heads: what the model calls so, and Linears near the top with a head's customary name."""
    found = {id(m) for m in [getattr(model, "get_output_embeddings", lambda: None)()] if isinstance(m, nn.Module)}
    for name, module in model.named_children():
        if name in _HEADS or name == "cls":
            found.update(id(m) for m in module.modules())
    return found


def sub_layer_named(component: str) -> str | None:
    """The kind of sub-layer, "attention" or "mlp", that one component of a name speaks of; None for neither."""
    if _ATTENTION.fullmatch(component):
        return "attention"
    return "mlp" if _MLP.fullmatch(component) else None


def named_as(preset: str, site: Site) -> bool:
    """Whether a site belongs to a preset by the components of its names."""
    if preset == "all-linear":
        return True
    parts = [site.name.split(".")] + [a.split(".") for a in site.aliases]
    attention = site.reader is not None or any(_ATTENTION.fullmatch(c) for p in parts for c in p)
    if preset == "attention":
        return attention
    if attention:
        return False
    # BERT's second feed-forward Linear is `layer.3.output.dense`; its first sits in `intermediate`
    return any(_MLP.fullmatch(c) for p in parts for c in p) or any(
        re.search(r"\.\d+\.output\.dense$", n) for n in site.names
    )


def select(
    model: nn.Module,
    sites: Sequence[Site],
    targets: Targets | None,
    *,
    exclude: Targets | None = None,
    layers: Iterable[int] | int | None = None,
    refuses: Callable[[Site], str | None],
    in_preset: Callable[[str, Site], bool],
    default: Sequence[str] = ("all-linear",),
) -> list[Site]:
    """The sites that `targets` names and the method accepts, in the model's order.

    Args:
        sites: what `walk` found in `model`.
        targets, exclude, layers: as in a config; `targets` None stands for the presets in `default`.
        refuses: why the method cannot be attached to a site; None where it can.
        in_preset: whether a preset means a site.

    Raises:
        TargetError: a pattern matches nothing, or only what the method refuses; a layer that does not exist.
    """
    written = () if targets is None else _as_tuple(targets)
    patterns = Patterns([t for t in written if not callable(t) and t not in PRESETS])
    presets = [t for t in written if isinstance(t, str) and t in PRESETS] if targets is not None else list(default)
    predicates = [t for t in written if callable(t)]
    wanted_layers = _wanted_layers(layers, sites)
    skip, skipped = _excluder(exclude, sites)

    chosen: list[Site] = []
    used: set[object] = set()
    refused: dict[object, tuple[str, str]] = {}
    for site in sites:
        hits: list[object] = []
        for name in site.names:
            hits += patterns.matching(name)
        hits += [p for p in presets if in_preset(p, site)]
        hits += [p for p in predicates if p(site.name, site.module)]
        if not hits:
            continue
        reason = refuses(site)
        if reason is not None:
            for h in hits:
                refused.setdefault(h, (site.name, reason))
            continue
        used.update(hits)
        if wanted_layers is not None and layer_index(site.name) not in wanted_layers:
            continue
        if not skip(site):
            chosen.append(site)

    def near(target: object) -> str:
        return nearest(target, [s.name for s in sites if refuses(s) is None])

    for t in written:
        if t not in used:
            if t in refused:
                where, why = refused[t]
                raise TargetError(f"targets: {_show(t)} matches {where!r}, but {why}{near(t)}")
            raise TargetError(f"targets: {_show(t)} matches no module that the method can adapt{near(t)}")
    if targets is None and not used:
        linears = ", or take every Linear with targets='all-linear'"
        raise TargetError(
            f"{' or '.join(default)}, the default, matches no module of {type(model).__name__}; name the modules with "
            f"targets={linears if any(in_preset('all-linear', s) for s in sites) else ''}{near('')}"
        )
    if skipped is not None:
        for t in skipped():
            raise TargetError(f"exclude: {_show(t)} matches no module{nearest(t, [s.name for s in sites])}")
    if not chosen:
        raise TargetError(
            f"targets={targets!r}, exclude={exclude!r} and layers={layers!r} together leave no module of "
            f"{type(model).__name__}"
        )
    return chosen


def _as_tuple(targets: Targets) -> tuple[Pattern | Predicate, ...]:
    if isinstance(targets, str | re.Pattern) or callable(targets):
        return (targets,)
    return tuple(targets)


def _show(target: object) -> str:
    return f"re.compile({target.pattern!r})" if isinstance(target, re.Pattern) else repr(target)


def _excluder(
    exclude: Targets | None, sites: Sequence[Site]
) -> tuple[Callable[[Site], bool], Callable[[], list[object]] | None]:
    if exclude is None:
        return (lambda site: False), None
    written = _as_tuple(exclude)
    patterns = Patterns([t for t in written if not callable(t)])
    predicates = [t for t in written if callable(t)]

    def hits(site: Site) -> list[object]:
        found: list[object] = [h for n in site.names for h in patterns.matching(n)]
        # excluding a block excludes what lies in it
        name = site.name
        while "." in name:
            name = name.rpartition(".")[0]
            found += patterns.matching(name)
        return found + [p for p in predicates if p(site.name, site.module)]

    def unused() -> list[object]:
        seen: set[object] = set()
        for site in sites:
            seen.update(hits(site))
        return [t for t in written if t not in seen]

    return (lambda site: bool(hits(site))), unused


def _wanted_layers(layers: Iterable[int] | int | None, sites: Sequence[Site]) -> set[int] | None:
    if layers is None:
        return None
    present = {i for s in sites if (i := layer_index(s.name)) is not None}
    count = max(present, default=-1) + 1
    wanted = set()
    for index in [layers] if isinstance(layers, int) else layers:
        at = index + count if index < 0 else index
        if at not in present:
            raise TargetError(f"layers: {index} is out of range; the model has blocks 0 to {count - 1}")
        wanted.add(at)
    return wanted


class PerSite(Generic[T]):
    """One value, or one by pattern, asked for a site's own; the most specific pattern decides.

    Raises:
        TargetError: a site that no pattern covers, two equally specific patterns that disagree, and at `finish`
            a pattern that covered no site.
    """

    def __init__(self, value: T | Mapping[str, T], field: str):
        self._field = field
        self._mapping: Mapping[Any, T] | None = value if isinstance(value, Mapping) else None
        self._value = value
        self._patterns = Patterns(self._mapping) if self._mapping is not None else None
        self._used: set[Pattern] = set()

    def at(self, site: Site) -> T:
        if self._mapping is None or self._patterns is None:
            return self._value  # type: ignore[return-value]
        hits = sorted(self._patterns.matching(site.name), key=_rank)
        if not hits:
            raise TargetError(
                f"{self._field} has no value for {site.name!r}; add a pattern for it, or '*' for all that is left"
            )
        self._used.update(hits)
        best, *others = hits
        for h in others:
            if _rank(h) == _rank(best) and self._mapping[h] != self._mapping[best]:
                raise TargetError(f"{self._field}: {best!r} and {h!r} both match {site.name!r}, with different values")
        return self._mapping[best]

    def finish(self, names: Iterable[str]) -> None:
        if self._mapping is None:
            return
        for p in self._mapping:
            if p not in self._used:
                raise TargetError(f"{self._field}: {_show(p)} matches none of the adapted modules{nearest(p, names)}")


def _rank(pattern: Pattern) -> tuple[int, int]:
    """Sorts patterns from specific to general: exact, longer suffix, glob with more literal characters."""
    if isinstance(pattern, re.Pattern):
        return (2, 0)
    if pattern.startswith("^"):
        return (0, 0)
    if _is_glob(pattern):
        return (2, -sum(c not in "*?[]" for c in pattern))
    return (1, -len(pattern))
