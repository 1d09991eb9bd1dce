"""Two methods as somebody else's package would define them, chosen because they bend the contract most.

VeRA (arXiv 2310.11454) shares frozen matrices between all sites; prefix-tuning (arXiv 2101.00190) acts inside attention
and knows no weight. Small sketches, held to the laws like every registered method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftkit.hosts import LinearHost, host_class, host_of, why_no_host
from peftkit.method import Adapter, Config
from peftkit.sites import Site


@dataclass(frozen=True, kw_only=True)
class SketchVeRAConfig(Config, method="sketch-vera"):
    r: int = 4
    seed: int = 0

    def refuses(self, site: Site) -> str | None:
        return why_no_host(site) or (None if host_class(site) is LinearHost else "it is no Linear")

    def prepare(self, sites: Sequence[Site]) -> tuple[nn.Parameter, nn.Parameter]:
        hosts = [host_of(s) for s in sites]
        g = torch.Generator().manual_seed(self.seed)
        a = torch.randn(self.r, max(h.cols for h in hosts), generator=g)
        b = torch.randn(max(h.rows for h in hosts), self.r, generator=g)
        return nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def build(self, site: Site, plan: tuple[nn.Parameter, nn.Parameter]) -> Adapter:
        return SketchVeRA(host_of(site), *plan)

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("lambda_d", "lambda_b")

    @classmethod
    def examples(cls) -> Sequence[Config]:
        return (cls(targets="all-linear"),)

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {"r": self.r, "projection_prng_key": self.seed}


class SketchVeRA(Adapter):
    tensor_names = {"d": "lambda_d", "b": "lambda_b"}

    def __init__(self, host, shared_a: nn.Parameter, shared_b: nn.Parameter):
        super().__init__()
        self.host, self.shared_a, self.shared_b = host, shared_a, shared_b
        self.d = nn.Parameter(torch.empty(shared_a.shape[0]))
        self.b = nn.Parameter(torch.empty(host.rows))
        self.merges = (host.weight_name,)

    def factors(self) -> tuple[Tensor, Tensor]:
        a = self.d[:, None] * self.shared_a[:, : self.host.cols]
        return a, self.b[:, None] * self.shared_b[: self.host.rows]

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self.host.add_low_rank(args[0], base(*args, **kwargs), *self.factors(), 1.0, 0.0)

    def why_not_merge(self) -> str | None:
        return self.host.why_not_merge()

    def delta(self, name: str) -> Tensor:
        return self.host.dense(*self.factors(), 1.0).to(self.host.weight.dtype)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        self.host.add_pair_(target, *self.factors(), 1.0)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.b)


@dataclass(frozen=True, kw_only=True)
class SketchPrefixConfig(Config, method="sketch-prefix"):
    length: int = 3
    targets: Any = "self_attn"

    @property
    def identity(self) -> Literal["none"]:
        return "none"

    def refuses(self, site: Site) -> str | None:
        return None if hasattr(site.module, "head_dim") and hasattr(site.module, "k_proj") else "it is no attention"

    def build(self, site: Site, plan: None) -> Adapter:
        k_proj = site.module.k_proj
        return SketchPrefix(self.length, k_proj.out_features // site.module.head_dim, site.module.head_dim)  # type: ignore[union-attr, operator]

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("prefix_key", "prefix_value")

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {"num_virtual_tokens": self.length}


class SketchPrefix(Adapter):
    """`key` and `value`: (kv_heads length head_dim)."""

    tensor_names = {"key": "prefix_key", "value": "prefix_value"}

    def __init__(self, length: int, heads: int, head_dim: int):
        super().__init__()
        self.key = nn.Parameter(torch.empty(heads, length, head_dim))
        self.value = nn.Parameter(torch.empty(heads, length, head_dim))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _PrefixedAttention(self.key, self.value):
            return base(*args, **kwargs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key)
        nn.init.normal_(self.value)


class _PrefixedAttention(TorchFunctionMode):
    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key, self.value = key, value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, *rest = args
        mask = kwargs.pop("attn_mask", rest[0] if rest else None)
        causal = kwargs.pop("is_causal", False)
        length, tokens = self.key.shape[1], k.shape[2]
        if mask is None:
            mask = torch.ones(q.shape[2], tokens, dtype=torch.bool)
            mask = mask.tril(tokens - q.shape[2]) if causal else mask
        before = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([before(*mask.shape[:-1], length), mask], -1)
        return func(
            q, self._beside(self.key, k), self._beside(self.value, v), attn_mask=mask, is_causal=False, **kwargs
        )

    @staticmethod
    def _beside(prefix: Tensor, tokens: Tensor) -> Tensor:
        prefix = prefix.to(tokens.dtype).repeat_interleave(tokens.shape[1] // prefix.shape[0], 0)
        return torch.cat([prefix.expand(tokens.shape[0], -1, -1, -1), tokens], 2)
