"""The model card, `README.md`: what the adapter is, on what base, and how to load it.

It begins with the metadata that the Hub reads, in YAML, and ends with a hash of itself: a card that nobody has edited is
replaced with the adapter that it describes, any other README is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftkit.holder import original_class
from peftkit.ledger import Attachment
from peftkit.method import Config
from peftkit.sites import Site, base_parameters, starred, walk

# Such a name needs no escaping anywhere, and the Hub, which refuses cards with other ones, takes it.
_ON_THE_HUB = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?(/[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?", re.ASCII
)
_MARK = re.compile(r"\n<!-- peftkit wrote this, as long as its hash is ([0-9a-f]{16}) -->\n\Z")
_LONG = 100


def text(
    model: nn.Module | None,
    attachment: Attachment,
    adapted: Mapping[str, Site],
    tensors: Mapping[str, Tensor],
    *,
    base: str | None,
    sampled: int,
    peft_reads: bool,
) -> str:
    """The card of `attachment`.

    Args:
        model: what it is attached to; None where that is a skeleton, of which nothing is to be said.
        adapted: the sites that its method adapts.
        tensors: what is stored, by key.
        base: the name or the path that the base was loaded by, where it is known.
        sampled: how many of its weights the stored fingerprint knows.
        peft_reads: whether peft reads the adapter as the same function.
    """
    base_id = base if base and _ON_THE_HUB.fullmatch(base) and not os.path.exists(base) else None
    method = attachment.config.method
    whole = [name for name in attachment.adapters if name not in adapted]
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    there = base_parameters(walk(model)) if model is not None else []
    total = sum(p.numel() for p in there if not nn.parameter.is_lazy(p))
    rows = {
        "method": _code(method),
        "settings": ", ".join(_code(s) for s in _settings(attachment.config)) or "none",
        "adapted modules": _modules(list(adapted)),
        "trained whole": _modules([n for n in whole if not attachment.adapters[n].beside]),
        "parameters": f"{count:,}" + (f", {100 * count / total:.3g} % of the base's {total:,}" if total else ""),
        "bytes": f"{size:,}",
        "dtype": ", ".join(sorted({_code(str(t.dtype).removeprefix("torch.")) for t in tensors.values()})),
        "base": _base(model, base, base_id, sampled),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    body = (
        f"{_metadata(method, base_id, peft_reads)}\n# A {_code(method)} adapter{f' for {_code(base_id)}' if base_id else ''}"
        f"\n\n| | |\n| --- | --- |\n{table}\n\n{_loading(model, attachment, base_id, peft_reads)}"
    )
    return f"{body}\n<!-- peftkit wrote this, as long as its hash is {_hash(body)} -->\n"


def unedited(found: str) -> bool:
    """Whether this README is a card as `text` made it."""
    mark = _MARK.search(found)
    return mark is not None and mark[1] == _hash(found[: mark.start()])


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _metadata(method: str, base_id: str | None, peft_reads: bool) -> str:
    library = "peft" if peft_reads else "peftkit"
    lines = [f"library_name: {library}"]
    if base_id:
        lines += [f"base_model: {json.dumps(base_id)}", "base_model_relation: adapter"]
    lines += ["tags:", "- peftkit", f"- {json.dumps(method)}"]  # a string of JSON is one of YAML
    return "\n".join(("---", *lines, "---", ""))


def _settings(config: Config) -> list[str]:
    shared = Config.keys()
    found = {key: getattr(config, key) for key in sorted(config.keys() - shared)}
    return [f"{key}={_short(value)}" for key, value in found.items() if value is not None and value is not False]


def _short(value: Any) -> str:
    said = repr(_as_lists(value))
    return said if len(said) <= _LONG else said[: _LONG - 1] + "…"


def _as_lists(value: Any) -> Any:
    """What is a list when it is given is a tuple when it was read."""
    if isinstance(value, Mapping):
        return {key: _as_lists(one) for key, one in value.items()}
    return [_as_lists(one) for one in value] if isinstance(value, list | tuple) else value


def _modules(names: Sequence[str]) -> str:
    """Their number, and their names with those that differ in their block's number alone as one."""
    if not names:
        return ""
    kinds = Counter(starred(name) for name in names)
    first = {starred(name): name for name in reversed(names)}
    said = [f"{_code(kind)} ×{n}" if n > 1 else _code(first[kind] or "the model") for kind, n in kinds.items()]
    more = f", and {len(said) - 20} more kinds" if len(said) > 20 else ""
    return f"{len(names):,}: {', '.join(said[:20])}{more}"


def _base(model: nn.Module | None, base: str | None, base_id: str | None, sampled: int) -> str:
    made = f", a {_code(original_class(model).__name__)}" if model is not None else ""
    if base_id:
        named = _code(base_id)
    elif base:  # a path tells of a machine, and is of no use on another
        last = [part for part in re.split(r"[/\\]", base) if part][-1:]
        named = f"a local one, {_code(last[0])}" if last else "a local one"
    else:
        named = "of no known name"
    known = f"; {sampled:,} of its weights are known by a sample, and another base is an error" if sampled else ""
    return f"{named}{made}{known}"


def _loading(model: nn.Module | None, attachment: Attachment, base_id: str | None, peft_reads: bool) -> str:
    cls = original_class(model) if model is not None else None
    code = ["import peftkit"]
    if base_id and cls is not None and cls.__module__.startswith("transformers."):
        code += [
            f"from transformers import {cls.__name__}",
            "",
            f"model = {cls.__name__}.from_pretrained({json.dumps(base_id)})",
        ]
    else:
        code += ["", "model = ...  # the base"]
    code += ['peftkit.load(model, "path/to/this/directory")  # or its name on the Hub, "user/name"']
    reasons = [r for a in attachment.adapters.values() if not a.beside and (r := a.why_not_merge()) is not None]
    if reasons:
        merging = f"It cannot be merged into the base's weights: {reasons[0]}.\n"
    else:
        code += ["peftkit.merge(model)  # if it is to cost nothing: the base's weights then hold it"]
        merging = ""
    fenced = "\n".join(("## How to load it", "", "```python", *code, "```", ""))
    also = (
        'peft reads it as well: `PeftModel.from_pretrained(model, "path/to/this/directory")`.\n' if peft_reads else ""
    )
    return "\n".join(part for part in (fenced, also, merging) if part)


def _code(said: str) -> str:
    """`said` as code within a cell of a table, whatever is in it."""
    plain = "".join(c if c.isprintable() else " " for c in said).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    padded = f" {plain} " if "`" in plain else plain
    return f"{ticks}{padded}{ticks}"
