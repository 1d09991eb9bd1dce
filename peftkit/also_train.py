"""Further modules to train and save whole, and single rows of an embedding: the `also_train` of every config.

Both hang on their module as adapters do, so the base keeps its bits, several names can have their own, and merging and
ejecting work as for any method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.graft import plain_copy
from peftkit.method import Adapter
from peftkit.sites import Site
from peftkit.targets import Patterns, TargetError, nearest


class WholeModule(Adapter):
    """A trainable copy of a module, called in its place."""

    replaces = True

    def __init__(self, copy: nn.Module):
        super().__init__()
        self.copy = copy.requires_grad_(True)
        for buffer in self.copy.buffers():
            buffer.requires_grad_(False)
        self.merges = tuple(self.copy.state_dict(keep_vars=True))
        self.tensor_names = {f"copy.{name}": name for name in self.merges}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.copy(*args, **kwargs)

    def delta(self, name: str) -> Tensor:
        raise AssertionError("a whole module takes the place of its host; it is no sum")

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        target.copy_(self.copy.state_dict()[name])

    def reset_parameters(self) -> None:
        """Its initial values are the host's, taken when it was copied."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in self.copy.state_dict().items()}

    @torch.no_grad()
    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        for name, t in self.copy.state_dict(keep_vars=True).items():
            t.data = found[name]


class TokenRows(Adapter):
    """Some rows of an embedding, trained; `rows: (n d)`. On a Linear tied to it, they are the same rows of its weight."""

    replaces = True
    merges = ("weight",)
    tensor_names = {"rows": "token_adapter.trainable_tokens_delta"}

    def __init__(self, weight: Tensor, ids: Sequence[int], rows: nn.Parameter | None = None):
        super().__init__()
        index = torch.tensor(ids, device=weight.device)
        self.register_buffer("ids", index, persistent=False)
        self.rows = nn.Parameter(weight.detach()[index].clone()) if rows is None else rows
        self.tied = rows is not None
        if self.tied:
            self.tensor_names = {}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        y = base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if self.tied:  # the output head: logits of these tokens
            return y.index_copy(-1, self.ids, F.linear(x, self.rows.to(x.dtype)))
        hits = x.unsqueeze(-1) == self.ids  # (... n)
        rows = F.embedding(hits.int().argmax(-1), self.rows.to(y.dtype))
        return torch.where(hits.any(-1, keepdim=True), rows, y)

    def delta(self, name: str) -> Tensor:
        raise AssertionError("trained rows take the place of the host's; they are no sum")

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        target[self.ids.to(target.device)] = self.rows.to(target)

    def reset_parameters(self) -> None:
        """Its initial values are the host's, taken when it was made."""

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.tied else super().tensors()

    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        if not self.tied:
            super().load_tensors(found)


def wanted(
    also_train: Sequence[str] | Mapping[str, Sequence[int] | None], sites: Sequence[Site]
) -> dict[Site, Sequence[int] | None]:
    """The sites that `also_train` names, with the rows to train or None for the whole module.

    Raises:
        TargetError: a pattern that matches nothing, rows of something that is no embedding or has fewer.
    """
    rows: Mapping[str, Sequence[int] | None] = (
        also_train if isinstance(also_train, Mapping) else dict.fromkeys(also_train)
    )
    patterns, found, used = Patterns(rows), {}, set()
    for site in sites:
        hits = [h for n in site.names for h in patterns.matching(n)] if site.part is None and site.name else []
        if not hits:
            continue
        used.update(hits)
        ids = rows[hits[0]]  # type: ignore[index]
        if ids is not None:
            ids = _checked_rows(site, ids)
        elif not any(True for _ in site.module.parameters()):
            raise TargetError(f"also_train: {site.name!r} is a {type(site.module).__name__} without parameters")
        found[site] = ids
    for p in rows:
        if p not in used:
            raise TargetError(f"also_train: {p!r} matches no module{nearest(p, [s.name for s in sites])}")
    return found


def build(found: Mapping[Site, Sequence[int] | None], sites: Sequence[Site]) -> dict[Site, Adapter]:
    """An adapter for each; weights tied among them stay tied in their copies.

    Raises:
        TargetError: a module to be trained whole shares a weight with one that is not.
    """
    made: dict[Site, Adapter] = {}
    whole = [s for s, ids in found.items() if ids is None]
    _check_ties(whole, sites)
    if whole:
        # copied together, so that what is tied stays tied
        copies = plain_copy(nn.ModuleList([s.module for s in whole]))
        made.update({s: WholeModule(c) for s, c in zip(whole, copies, strict=True)})  # type: ignore[call-overload]
    for site, ids in found.items():
        if ids is None:
            continue
        weight = site.module._parameters["weight"]
        assert weight is not None
        made[site] = adapter = TokenRows(weight, ids)
        for other in sites:
            if other.module is not site.module and isinstance(other.module, nn.Linear) and other.part is None:
                if other.module._parameters.get("weight") is weight:
                    made[other] = TokenRows(weight, ids, adapter.rows)
    return made


def _checked_rows(site: Site, ids: Sequence[int]) -> list[int]:
    if not isinstance(site.module, nn.Embedding):
        raise TargetError(f"also_train: rows can be trained of an Embedding; {site.name!r} is a {type(site.module).__name__}")
    ids, count = sorted(set(ids)), site.module.num_embeddings
    if not ids or ids[0] < 0 or ids[-1] >= count:
        raise TargetError(f"also_train: rows of {site.name!r} lie in 0 … {count - 1}; got {ids}")
    return ids


def _check_ties(whole: Sequence[Site], sites: Sequence[Site]) -> None:
    inside = {id(m) for s in whole for m in s.module.modules()}
    own = {id(p): s.name for s in whole for p in s.module.parameters()}
    for site in sites:
        if site.part is None and id(site.module) not in inside:
            for p in site.module._parameters.values():
                if p is not None and id(p) in own:
                    raise TargetError(
                        f"also_train: {own[id(p)]!r} shares a weight with {site.name!r}; name both, and they stay tied, "
                        "or untie them first"
                    )
