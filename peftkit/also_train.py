"""Further modules to train and save whole, and single rows of an embedding: the `also_train` of every config.

Both hang on their module as adapters do, so the base keeps its bits, several names can have their own, and merging and
ejecting work as for any method.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.graft import plain_copy, why_not_graft
from peftkit.hosts import ModuleRef
from peftkit.method import Adapter
from peftkit.sites import Site
from peftkit.targets import Patterns, TargetError, nearest

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRAINABLE = (nn.Parameter, Tensor)
_NEVER_CALLED = (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


class InPlace(Adapter):
    """What takes the place of values of its host.

    Attributes:
        ties: parameter -> the adapter and its parameter that it shares; what replaces parameters forgets it.
    """

    replaces = True

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = ModuleRef(module)
        self.ties: dict[str, tuple[Adapter, str]] = {}

    def why_not_merge(self) -> str | None:
        return _why_not_write(self._module())

    def delta(self, name: str) -> Tensor:
        raise AssertionError("it takes the place of its host's values and is no sum")

    def tie(self) -> None:
        for name, (other, theirs) in self.ties.items():
            path, _, last = name.rpartition(".")
            self.get_submodule(path)._parameters[last] = other.get_parameter(theirs)


class WholeModule(InPlace):
    """A trainable copy of a module, called in its place."""

    copy: nn.Module

    def __init__(self, copy: nn.Module, module: nn.Module):
        super().__init__(module)
        self.copy = copy.requires_grad_(True)
        self.training = copy.training
        for hooks in _HOOKS:  # the module's own run around the copy
            getattr(copy, hooks).clear()
        self.merges = tuple(self.copy.state_dict(keep_vars=True))
        self.tensor_names = {f"copy.{name}": name for name in self.merges}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own, host = _dtype(self.copy), _dtype(self._module())
        if own is host or torch.is_autocast_enabled(next(self.copy.parameters()).device.type):
            return self.copy(*args, **kwargs)
        args = tuple(_cast(a, own) for a in args)  # saved over a base of another dtype
        return _cast(self.copy(*args, **{k: _cast(v, own) for k, v in kwargs.items()}), host)

    def applied(self, name: str, weight: Tensor) -> Tensor:
        return named_tensor(self.copy, name).to(weight.dtype)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        target.copy_(named_tensor(self.copy, name))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from the host's values."""
        module = self._module()
        for name in self.merges:
            _take(named_tensor(self.copy, name), named_tensor(module, name))
        self.tie()

    def tensors(self) -> dict[str, Tensor]:
        return {name: named_tensor(self.copy, name).detach() for name in self.merges}

    @torch.no_grad()
    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        for name in self.merges:
            own = named_tensor(self.copy, name)
            if own.is_meta:
                _take(own, found[name])
            else:
                own.data = found[name].to(own.device)


class TokenRows(InPlace):
    """Some rows of an embedding, trained; `rows: (n d)`. On a Linear tied to it, they are the same rows of its weight."""

    merges = ("weight",)
    tensor_names = {"rows": "token_adapter.trainable_tokens_delta"}

    def __init__(self, module: nn.Module, ids: Sequence[int], rows: nn.Parameter | None = None):
        super().__init__(module)
        weight: Any = module._parameters["weight"]
        self.head = isinstance(module, nn.Linear)
        self.which = tuple(ids)
        device = torch.device("cpu") if weight.is_meta else weight.device  # a file has values before the base has
        self.register_buffer("ids", torch.tensor(ids, device=device), persistent=False)
        self.rows = nn.Parameter(weight.new_empty(len(ids), weight.shape[1])) if rows is None else rows
        self.tied = rows is not None
        if self.tied:
            self.tensor_names = {}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        y = base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        module: Any = self._module()
        if self.head:  # logits of these tokens
            logits = F.linear(x, self.rows.to(x.dtype))
            if module.bias is not None:  # offloaded, it is there within `base` alone
                bias = base(x.new_zeros(1, x.shape[-1]))[0] if module.bias.is_meta else module.bias
                logits = logits + bias[self.ids]
            return y.index_copy(-1, self.ids, logits.to(y.dtype))
        at = torch.searchsorted(self.ids, x.to(self.ids.dtype)).clamp(max=len(self.ids) - 1)
        hits = self.ids[at] == x
        rows = F.embedding(at, self.rows).to(y.dtype) * getattr(module, "embed_scale", 1.0)
        return torch.where(hits.unsqueeze(-1), rows.to(y.dtype), y)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        target[self.ids.to(target.device)] = self.rows.to(target)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from the host's values."""
        weight: Any = self._module()._parameters["weight"]  # type: ignore[union-attr]
        self.ids = torch.tensor(self.which, device=weight.device)  # the meta device had none
        _take(self.rows, weight[self.ids])
        self.tie()

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.tied else super().tensors()

    @torch.no_grad()
    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        if not self.tied:
            _take(self.rows, found["token_adapter.trainable_tokens_delta"].to(self.ids.device))


def named_tensor(module: Any, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    value = holder._parameters.get(last)
    return holder._buffers[last] if value is None else value


def _take(own: Tensor, value: Tensor) -> None:
    """Give a tensor that may lie on the meta device a value, and stay the same object, which others may share."""
    if own.is_meta and not value.is_meta:
        trains = own.requires_grad
        fresh = value.detach().clone()
        torch.utils.swap_tensors(own, nn.Parameter(fresh, trains) if isinstance(own, nn.Parameter) else fresh)
    elif own.dtype is value.dtype and own.device == value.device:
        own.copy_(value)
    else:
        own.data = value.detach().clone()


def _dtype(module: Any) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), None)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None else value


def _why_not_write(module: Any) -> str | None:
    for name, t in module.state_dict(keep_vars=True).items():
        if t.is_meta:
            return f"its {name} is on the meta device, or offloaded there by accelerate"
        if type(t) not in (nn.Parameter, Tensor):
            return f"its {name} is a {type(t).__name__}"
    return None


# -- choosing -----------------------------------------------------------------------------------------------------------


def wanted(
    also_train: Sequence[str] | Mapping[str, Sequence[int] | None], sites: Sequence[Site]
) -> dict[Site, Sequence[int] | None]:
    """The sites that `also_train` names, with the rows to train or None for the whole module.

    Raises:
        TargetError: a pattern that matches nothing, rows of something that is no embedding or has fewer, a module that
            cannot be copied and trained, or lies in another one that is named.
    """
    if not also_train:
        return {}
    rows: Mapping[str, Sequence[int] | None] = (
        also_train if isinstance(also_train, Mapping) else dict.fromkeys(also_train)
    )
    patterns, found, used = Patterns(rows), {}, set()
    attentions = {n for s in sites if s.part is None and isinstance(s.module, nn.MultiheadAttention) for n in s.names}
    for site in sites:
        # as a target, an attention's name means its projections too; here it means the module
        names = [n for n in site.names if site.reader is None or n not in attentions]
        hits = [h for n in names for h in patterns.matching(n)] if site.part is None and site.name else []
        if not hits:
            continue
        used.update(hits)
        ids = rows[hits[0]]  # type: ignore[index]
        if any(rows[h] != ids for h in hits):  # type: ignore[index]
            raise TargetError(
                f"also_train: {' and '.join(map(repr, hits))} both match {site.name!r} and want different rows"
            )
        if ids is not None:
            ids = _checked_rows(site, ids)
        elif (reason := why_not_graft(site.module) or _why_not_whole(site.module)) is not None:
            raise TargetError(f"also_train: {site.name!r} cannot be trained whole: {reason}")
        found[site] = ids
    for p in rows:
        if p not in used:
            raise TargetError(f"also_train: {p!r} matches no module{nearest(p, [s.name for s in sites])}")
    _check_apart(found)
    return found


def build(found: Mapping[Site, Sequence[int] | None], sites: Sequence[Site]) -> dict[Site, InPlace]:
    """An adapter for each; weights tied among them stay tied in their copies.

    Raises:
        TargetError: a weight is shared with a module that would go on with the old one.
    """
    made: dict[Site, InPlace] = {}
    if not found:
        return made
    whole = [s for s, ids in found.items() if ids is None]
    _check_ties(whole, sites)
    if whole:
        # copied together, so that what is tied stays tied
        copies = plain_copy(nn.ModuleList([s.module for s in whole]))
        made.update({s: WholeModule(c, s.module) for s, c in zip(whole, copies, strict=True)})  # type: ignore[call-overload]
    for site, ids in found.items():
        if ids is None:
            continue
        made[site] = adapter = TokenRows(site.module, ids)
        for other in sites:
            module = other.module
            if module is site.module or other.part is not None:
                continue
            if any(p is site.module.weight for p in module._parameters.values()):
                if other in found or not isinstance(module, nn.Linear | nn.Embedding):
                    raise TargetError(
                        f"also_train: {site.name!r} shares its weight with {other.name!r}, "
                        + (
                            "name one of them, the other follows"
                            if other in found
                            else f"a {type(module).__name__}, which would not know of the rows; untie them first"
                        )
                    )
                made[other] = TokenRows(module, ids, adapter.rows)
    first: dict[int, tuple[Adapter, str]] = {}
    for one in made.values():
        for name, p in one.named_parameters(remove_duplicate=False):
            if id(p) in first:
                one.ties[name] = first[id(p)]
            first.setdefault(id(p), (one, name))
    return made


def _checked_rows(site: Site, ids: Sequence[int]) -> list[int]:
    if not isinstance(site.module, nn.Embedding):
        raise TargetError(
            f"also_train: rows can be trained of an Embedding; {site.name!r} is a {type(site.module).__name__}"
        )
    weight = site.module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise TargetError(
            f"also_train: the weight of {site.name!r} is a {type(weight).__name__}, which has no rows to copy"
        )
    if site.module.max_norm is not None:
        raise TargetError(f"also_train: {site.name!r} has max_norm, so it rewrites its own rows in every forward")
    try:
        ids = sorted({operator.index(i) for i in ids})
    except TypeError as error:
        raise TargetError(f"also_train: rows of {site.name!r} are token ids, not {ids!r}") from error
    count = site.module.num_embeddings
    if not ids or ids[0] < 0 or ids[-1] >= count:
        raise TargetError(f"also_train: rows of {site.name!r} lie in 0 … {count - 1}; got {ids}")
    return ids


def _why_not_whole(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if not any(True for _ in module.parameters()):
        return f"it is a {kind} without parameters"
    if type(module).forward in _NEVER_CALLED:
        return f"a {kind} is never called, its members are; name these"
    for name, part in module.named_modules():
        where = f"{name} in it" if name else "it"
        if isinstance(part, nn.modules.lazy.LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[arg-type]
            return f"{where} has no shape yet; run one batch through the model first"
        if any(isinstance(v, Tensor) and v.grad_fn is not None for v in vars(part).values()):
            return f"{where} computes a weight by a hook (weight_norm or the like)"
        for key, p in part._parameters.items():
            if p is not None and (not p.is_floating_point() or type(p) not in _TRAINABLE):
                return f"{key} of {where} is a {type(p).__name__} of {p.dtype}, which cannot be trained"
            if p is not None and p.is_meta and getattr(part, "_hf_hook", None) is not None:
                return f"{key} of {where} is offloaded by accelerate; attach before offloading"
    return None


def _check_apart(found: Mapping[Site, Sequence[int] | None]) -> None:
    for site, ids in found.items():
        inside = {id(m) for m in site.module.modules()} if ids is None else set()
        for other in found:
            if other is not site and id(other.module) in inside:
                raise TargetError(
                    f"also_train: {other.name!r} lies in {site.name!r}, which is trained whole; name one of them"
                )


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
