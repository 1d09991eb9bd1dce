"""What LoHa and LoKr have in common: a rank and an alpha for each site, a change of the weight, peft's fields for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftkit import pairs
from peftkit.dtypes import check_dtype
from peftkit.hosts import EmbeddingHost, Host, host_class, host_of, why_no_host
from peftkit.method import Adapter, Config
from peftkit.peft_patterns import PeftPatterns, compact, most_common, pattern_keys
from peftkit.sites import Site
from peftkit.targets import PerSite
from peftkit.weight_change import WeightChange

KERNELS = ("hada_t1", "hada_t2", "lokr_t2")  # of peft's decomposition of a kernel


@dataclass(frozen=True)
class Plan:
    """A site's host, rank and alpha."""

    host: Host
    r: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class FactoredConfig(Config):
    """A change of the weight `ΔW = alpha/r · f(factors of rank r)`; `r` and `alpha` as LoRA's."""

    r: int | Mapping[str, int] = 8
    alpha: float | Mapping[str, float] | None = None
    dtype: torch.dtype | None = None

    default_targets: ClassVar[Sequence[str]] = ("attention", "mlp")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "alpha"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(value))
        pairs.check_settings(self.r, self.alpha, 0.0)
        check_dtype(self.dtype)

    def refuses(self, site: Site) -> str | None:
        if (reason := why_no_host(site)) is not None:
            return reason
        return "it is an Embedding, whose rows no product makes" if host_class(site) is EmbeddingHost else None

    def prepare(self, sites: Sequence[Site]) -> dict[str, Plan]:
        r, alpha = PerSite(self.r, "r"), PerSite(self.alpha, "alpha")
        plan = {}
        for site in sites:
            rank = r.at(site)
            plan[site.name] = Plan(host_of(site), rank, float(alpha.at(site) or rank))
        names = [s.name for s in sites]
        for values in (r, alpha):
            values.finish(names)
        return plan

    # -- the file -----------------------------------------------------------------------------------------------------

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        made = {path: a for path, a in adapters.items() if isinstance(a, FactoredAdapter)}
        keys = pattern_keys(made)
        r, ranks = most_common({path: a.r for path, a in made.items()}, keys)
        alpha, alphas = most_common({path: _int_if_whole(a.alpha) for path, a in made.items()}, keys)
        return {
            "r": r,
            "alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
            "use_effective_conv2d": False,
            "layers_pattern": None,
            "layers_to_transform": None,
        }

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> FactoredConfig:
        """`rank_dropout` and `module_dropout`, which act in training alone, are not kept.

        Raises:
            ValueError: a kernel decomposed as well, by peft's `use_effective_conv2d`.
        """
        for path, found in shapes.items():
            if any(key in KERNELS for key in found):
                raise ValueError(
                    f"use_effective_conv2d=True has decomposed the kernel of {path!r} as well, which is not supported by "
                    f"{cls.__name__}"
                )
        rank = PeftPatterns(stored.get("rank_pattern") or {}, stored.get("r", 8))
        alpha = PeftPatterns(stored.get("alpha_pattern") or {}, stored.get("alpha", 8))
        return cls(
            r=compact({path: rank.at(path) for path in shapes}),
            alpha=compact({path: alpha.at(path) for path in shapes}),
            targets=tuple(f"^{path}" for path in shapes),
            **cls.own_fields(stored),
        )

    @classmethod
    def own_fields(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the method alone, from an `adapter_config.json`."""
        return {}


class FactoredAdapter(WeightChange):
    """Factors of rank `r`; `scale` is `alpha/r`."""

    r: int
    alpha: float
    scale: float

    def __init__(self, plan: Plan, **attributes: Any):
        super().__init__(plan.host, r=plan.r, alpha=plan.alpha, scale=plan.alpha / plan.r, **attributes)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}"


def kaiming_(t: Tensor) -> None:
    """Uniform in ±1/√fan_in, as peft draws factors (Kaiming's with a = √5); a vector's fan is its length."""
    t.uniform_(-1, 1).div_(math.sqrt(t[0].numel()))


def _int_if_whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x
