"""Prefix-tuning: learned keys and values in front of every attention's (Li and Liang, arXiv 2101.00190).

In every layer `K ← [P_K; K]`, `V ← [P_V; V]`; queries, and with them the length of the output, stay. P-tuning v2 (Liu et
al., arXiv 2110.07602) is the same for understanding, without the reparametrisation. The first paper trains the prefix
through an MLP, `P = W₂ tanh(W₁ E)`, and stores what comes out of it; that is `reparametrize`.

In the paper the prefix is part of the sequence, so tokens stand behind it, at positions `length` and up
(`shift_positions=True`, the default, which its code and peft do too). The prefix's keys are free parameters and are not
rotated. With rotary positions the two choices span the same functions, since only distances count; with learned
positions, unshifted tokens keep the positions that the model was trained on and none is lost to the prefix.

An encoder-decoder model has three attentions, and the paper gives each a prefix of its own: encoder, decoder and cross.
So does this, where `targets` leaves none out; peft prefixes the decoder's self-attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import attention, ledger
from peftkit.attention import Prefixing, Sizes
from peftkit.dtypes import check_dtype, own_dtype
from peftkit.method import Adapter, Config
from peftkit.peft_prefix import PACKED, PEFT_TYPE, places, read_config, settings, why_peft_differs
from peftkit.peft_tasks import task_of
from peftkit.sites import Site
from peftkit.targets import TargetError

INITS = ("normal", "zero")
OWN_TYPE, OWN_PACKED = "PEFTKIT_PREFIX", "prefix_embeddings"  # where peft would read another function


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(Config, method="prefix", peft_type=PEFT_TYPE):
    """Prefix-tuning (arXiv 2101.00190), P-tuning v2 (arXiv 2110.07602).

    Args:
        targets: attentions; None is every one of the model, self and cross.
        length: columns put in front; 5 to 200 in the papers.
        shift_positions: whether tokens stand behind the prefix, at positions `length` and up, in models whose rotary,
            learned or T5's relative positions enter through a module; elsewhere there is nothing to shift.
        init: `"normal"` (mean 0, std 1, as P-tuning v2's code) or `"zero"`; see also `start_from_tokens`.
        reparametrize: width of the hidden layer of the MLP that the prefix is trained through, 512 and 800 in the paper;
            None trains the prefix itself. What is stored is the prefix in either case.
        dtype: of the prefix; None is fp32 over a half-precision base and the base's own dtype otherwise. It is cast to
            the keys' dtype.
        kv_heads, head_dim: of the keys and values, where a module does not tell.

    Raises:
        ValueError: a length or width below 1, an unknown init, a dtype that is no floating-point one.
    """

    length: int = 20
    shift_positions: bool = True
    init: Literal["normal", "zero"] = "normal"
    reparametrize: int | None = None
    dtype: torch.dtype | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    mergeable: ClassVar[bool] = False
    default_targets: ClassVar[Sequence[str]] = ("attention",)
    other_peft_types: ClassVar[Sequence[str]] = (OWN_TYPE,)
    key_prefix: ClassVar[str] = "base_model."
    whole_keys: ClassVar[Sequence[str]] = (PACKED, OWN_PACKED)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "reparametrize", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not (value is None and name != "length") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: a positive whole number, not {value!r}")
        if self.init not in INITS:
            raise ValueError(f"init: one of {', '.join(map(repr, INITS))}, not {self.init!r}")
        check_dtype(self.dtype)

    @property
    def identity(self) -> Literal["none"]:
        return "none"  # a prefix of zeros too takes its share of the softmax

    def refuses(self, site: Site) -> str | None:
        return attention.why_no_attention(site)

    def presets(self, model: nn.Module, sites: Sequence[Site]) -> Callable[[str, Site], bool]:
        """`"attention"` means every attention, and no other preset means any.

        Raises, when asked:
            TargetError: an attention that cannot be reached, which the default would silently leave out.
        """

        def means(preset: str, site: Site) -> bool:
            if preset != "attention":
                return False
            if attention.unreachable(site):
                raise TargetError(
                    f"{site.name!r} matches 'attention', but {attention.why_no_attention(site)}; or name the others "
                    "with targets="
                )
            return attention.why_no_attention(site) is None

        return means

    def prepare(self, sites: Sequence[Site]) -> _Plan:
        sizes = {s.name: attention.sizes_of(s, self.kv_heads, self.head_dim) for s in sites}
        source, at, offsets = None, 0, {}
        for name, own in sizes.items():
            offsets[name] = at
            at += own.heads * (own.key + own.value)
        if self.reparametrize is not None:
            first = sizes[sites[0].name]
            like = _like(sites[0].module)
            source = _Source(self.length, first.heads * first.key, self.reparametrize, at, self._dtype(like), like)
        return _Plan(sizes, offsets, source)

    def build(self, site: Site, plan: _Plan) -> Prefix:
        return Prefix(site, self, plan)

    def _dtype(self, like: Tensor | None) -> torch.dtype:
        base = torch.get_default_dtype() if like is None else like.dtype
        return own_dtype(base, self.dtype)

    def beside(self, everything: Sequence[Site], adapters: Mapping[str, Any]) -> Mapping[Site, Adapter]:
        root = everything[0].module
        for adapter in adapters.values():
            adapter.base_config = getattr(root, "config", None)
        if not self.shift_positions:
            return {}
        attention.find_biases(everything, adapters)
        found = attention.position_sites(everything, [s for s in everything if s.name in adapters])
        return {s: attention.PositionShift(s, self.length) for s in found}

    def setup(self, model: nn.Module) -> Callable[[], None]:
        return partial(attention.give_back, attention.let_see(model.modules()))

    @classmethod
    def examples(cls) -> Sequence[PrefixTuningConfig]:
        return (cls(length=3), cls(length=2, shift_positions=False, init="zero", reparametrize=5))

    # -- the file ---------------------------------------------------------------------------------------------------

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ()

    def whole_tensors(self, adapters: Mapping[str, Any]) -> dict[str, Tensor]:
        """One tensor, (length columns): for each attention in turn its key and its value, each (kv_heads head_dim)."""
        pairs = [torch.cat([t.transpose(0, 1).flatten(1) for t in a.prefix()], 1) for a in adapters.values()]
        if settings(self, adapters) is None:
            return {OWN_PACKED: torch.cat(pairs, 1).detach()}
        found = [torch.zeros_like(pair) for pair in pairs]
        for place, pair in zip(places(adapters), pairs, strict=True):
            found[place] = pair
        return {PACKED: torch.cat(found, 1).detach()}

    def load_whole(self, found: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> None:
        columns = [a.sizes.heads * (a.sizes.key + a.sizes.value) for a in adapters.values()]
        key = next((k for k in self.whole_keys if k in found), None)
        if key is None:
            raise ValueError(f"missing {PACKED}; the file is not complete")
        packed, expected = found[key], (self.length, sum(columns))
        if packed.shape != expected:
            raise ValueError(
                f"{key} has shape {tuple(packed.shape)}, expected {expected}: {self.length} columns before each of "
                f"{len(columns)} attentions; the adapter belongs to a model of another size"
            )
        if not packed.is_floating_point():
            raise ValueError(f"{key} is {packed.dtype}, expected a floating-point dtype")
        pairs = packed.split(columns, 1)
        if key == PACKED and (reason := why_peft_differs(adapters)) is not None:
            raise ValueError(f"{key}, as peft wrote it, is another function here: {reason}")
        at = range(len(columns)) if key == OWN_PACKED else places(adapters)
        for place, adapter in zip(at, adapters.values(), strict=True):
            adapter.hold(pairs[place])

    def peft_task(self, model: nn.Module, whole: Sequence[str]) -> str | None:
        return task_of(model, whole)

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        own = {"peft_type": OWN_TYPE, "num_virtual_tokens": self.length, "shift_positions": self.shift_positions}
        return settings(self, adapters) or own

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> PrefixTuningConfig:
        return cls(**read_config(stored))


@dataclass(frozen=True)
class _Plan:
    """Sizes by site, where each site's columns begin in the packed prefix, and the MLP they share, if any."""

    sizes: Mapping[str, Sizes]
    offsets: Mapping[str, int]
    source: _Source | None


class _Source(nn.Module):
    """The MLP that all prefixes are trained through: `W₂ tanh(W₁ E)`, (length columns)."""

    def __init__(
        self, length: int, width: int, hidden: int, columns: int, dtype: torch.dtype, like: Tensor | None
    ) -> None:
        super().__init__()
        device = None if like is None else like.device
        self.tokens = nn.Embedding(length, width, dtype=dtype, device=device)
        self.down = nn.Linear(width, hidden, dtype=dtype, device=device)
        self.up = nn.Linear(hidden, columns, dtype=dtype, device=device)

    def part(self, start: int, stop: int) -> Tensor:
        hidden = torch.tanh(self.down(self.tokens.weight))
        return F.linear(hidden, self.up.weight[start:stop], self.up.bias[start:stop])


class Prefix(Prefixing):
    """`key` and `value`: (kv_heads length head_dim), or, reparametrised, a share of `source`."""

    key: nn.Parameter
    value: nn.Parameter

    def __init__(self, site: Site, config: PrefixTuningConfig, plan: _Plan):
        kind = attention.kind_of(site.module)
        assert kind is not None
        super().__init__(site, kind, config.length, config.shift_positions)
        self.sizes, self.init, self.offset = plan.sizes[site.name], config.init, plan.offsets[site.name]
        self.base_config = None
        self.source = plan.source
        if plan.source is None:
            like = _like(site.module)
            device, dtype = None if like is None else like.device, config._dtype(like)
            heads, length = self.sizes.heads, config.length
            self.key = nn.Parameter(torch.empty(heads, length, self.sizes.key, device=device, dtype=dtype))
            self.value = nn.Parameter(torch.empty(heads, length, self.sizes.value, device=device, dtype=dtype))

    def prefix(self) -> tuple[Tensor, Tensor]:
        if self.source is None:
            return self.key, self.value
        columns = self.sizes.heads * (self.sizes.key + self.sizes.value)
        key, value = self._split(self.source.part(self.offset, self.offset + columns))
        return self._by_head(key), self._by_head(value)

    def _split(self, pair: Tensor) -> tuple[Tensor, ...]:
        return pair.split([self.sizes.heads * self.sizes.key, self.sizes.heads * self.sizes.value], 1)

    def _by_head(self, columns: Tensor) -> Tensor:
        return columns.unflatten(1, (self.sizes.heads, -1)).transpose(0, 1)

    @torch.no_grad()
    def hold(self, pair: Tensor) -> None:
        """Take over (length columns), key and value, of a file; what was reparametrised no longer is."""
        device = next(self.parameters()).device
        self.source = None
        for name, columns in zip(("key", "value"), self._split(pair), strict=True):
            made = self._by_head(columns).clone(memory_format=torch.contiguous_format)
            setattr(self, name, nn.Parameter(made if device.type == "meta" else made.to(device)))

    def why_not_merge(self) -> str:
        return "a prefix is further columns of a softmax over what the input is; no weight can hold it"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `init` says; reparametrised, the MLP's last layer is what is zero."""
        if self.source is not None:
            if self.offset == 0:
                like = _like(self.module())  # type: ignore[arg-type]
                if self.source.up.weight.is_meta and like is not None and not like.is_meta:
                    self.source.to_empty(device=like.device)
                for module in self.source.children():
                    module.reset_parameters()  # type: ignore[operator]
                if self.init == "zero":
                    nn.init.zeros_(self.source.up.weight)
                    nn.init.zeros_(self.source.up.bias)
            return
        like = _like(self.module())  # type: ignore[arg-type]
        for name in ("key", "value"):
            p: Any = self._parameters[name]
            if p.is_meta and like is not None and not like.is_meta:
                p = self._parameters[name] = nn.Parameter(torch.empty_like(p, device=like.device), p.requires_grad)
            if not p.is_meta:
                nn.init.zeros_(p) if self.init == "zero" else nn.init.normal_(p)

    def extra_repr(self) -> str:
        return f"length={self.length}, {self.sizes.heads}×{self.sizes.key}"


def _like(module: nn.Module) -> Tensor | None:
    """A weight of the base, whose device and dtype the prefix follows."""
    found = (p for n, p in module.named_parameters() if "peftkit." not in n)
    return next((p for p in found if p.is_floating_point() and p.dtype.itemsize > 1), None)


@torch.no_grad()
def start_from_tokens(model: nn.Module, input_ids: Tensor, *, name: str = "default", **inputs: Any) -> None:
    """Start the prefix from the keys and values that the model has for real tokens (section 7.4 of arXiv 2101.00190).

    The model runs once, in eval mode and without prefixes. What each attention attends to is taken over as it is there:
    keys behind normalisation and rotation, at positions 0 to length − 1. With `shift_positions` a causal model then
    computes for its tokens what it computed for them behind these.

    Args:
        input_ids: (length) or (1 length).
        inputs: further arguments of the model's forward, such as `decoder_input_ids`.

    Raises:
        KeyError: no such adapter.
        ValueError: it is no prefix, or reparametrised; not as many tokens as it is long.
    """
    _, record = ledger.require(model)
    (attachment,) = record.named([name])
    adapters = [a for a in attachment.adapters.values() if isinstance(a, Prefix)]
    if not adapters:
        raise ValueError(f"{name!r} is no prefix but {type(attachment.config).__name__}")
    if any(a.source is not None for a in adapters):
        raise ValueError(f"{name!r} is reparametrised, and no MLP is known that gives a prefix; reparametrize=None")
    local, modes = record.switch.local, [(m, m.training) for m in model.modules()]
    before, local.names = local.names, (name,)
    try:
        model.eval()
        with attention.recording() as seen:
            model(input_ids.reshape(1, -1), **inputs)
    finally:
        local.names = before
        for module, training in modes:
            module.training = training
    taken = []
    for adapter in adapters:
        if id(adapter) not in seen:
            raise ValueError(f"{adapter.where!r} did not compute in this forward; give the inputs that it needs")
        pair = [t.reshape(-1, *t.shape[-3:])[0] for t in seen[id(adapter)]]
        if pair[0].shape[-2] != adapter.length:
            raise ValueError(
                f"{adapter.where!r} attended to {pair[0].shape[-2]} tokens, but {name!r} is {adapter.length} long; give "
                "as many"
            )
        taken.append([t[:: t.shape[0] // adapter.sizes.heads] for t in pair])
    for adapter, (key, value) in zip(adapters, taken, strict=True):
        adapter.key.copy_(key)
        adapter.value.copy_(value)
