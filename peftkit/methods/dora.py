"""DoRA: weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353).

`W' = m ∘ (W + s·BA) / n`, with `n` the norms of the rows of `W + s·BA` (equation 5): one magnitude m for every output
feature, trained beside the pair, and n taken as a constant in backward (section 4.3). So

    y = g ∘ (W x + s·BA drop(x)) + bias,    g = m / n

m starts as n, computed by the one function that computes it ever after, so g is exactly 1 and the output at attach is the
base's. The paper's text, which draws W as (in, out), speaks of the norm of each column; its code, and everybody's files,
have one magnitude an output feature: of an embedding's vector, of a convolution's channel.

Dropout acts on the input of A alone, as in LoRA. The authors' code and peft, with a dropout other than 0, compute
`W x + bias + (g − 1) ∘ W drop(x) + g ∘ s·BA drop(x)`, which drops part of the base's product too and needs that product
twice. Without dropout, in evaluation and merged, both are the same function.

Several adapters add up: what DoRA adds, `(g − 1) ∘ W x + g ∘ s·BA x`, is relative to the weight of the base, so the order in
which adapters are activated does not matter and each can leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import pairs
from peftkit.graft import underneath
from peftkit.holder import graft_of
from peftkit.hosts import Host, LinearHost, host_of
from peftkit.kept_norms import KeptNorms
from peftkit.kernels.dora_linear import dora_linear
from peftkit.kernels.dora_norm import composed
from peftkit.kernels.rescale import rescale
from peftkit.kernels.row_norms import row_norms
from peftkit.leading import INITS as FROM_BASE
from peftkit.pairs import PairAdapter, PairConfig
from peftkit.sites import Site
from peftkit.targets import Pattern, Patterns, TargetError, nearest

FEW = 16  # tokens for which a call of an operator costs more than its arithmetic
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(PairConfig, method="dora", peft_type="LORA"):
    """DoRA (arXiv 2402.09353).

    Args:
        r, alpha, dropout, rank_stabilized, dtype: as for `LoRAConfig`. Magnitudes are kept in fp32 at least.
        init: `"kaiming"` or `"gaussian"` (std 1/r).
        magnitude_only: patterns of targets that get a magnitude and no pair, as `Wdecompose_target_modules` of the
            authors' code.

    Raises:
        ValueError: as for `LoRAConfig`; an init that takes the pair from the weight.
    """

    magnitude_only: Sequence[Pattern] = ()

    def __post_init__(self) -> None:
        one = isinstance(self.magnitude_only, str) or not isinstance(self.magnitude_only, Sequence)
        object.__setattr__(self, "magnitude_only", (self.magnitude_only,) if one else tuple(self.magnitude_only))
        if self.init in FROM_BASE:
            raise ValueError(
                f"init={self.init!r} takes part of the weight out of the base, and a magnitude is relative to the whole "
                f"weight; for DoRA one of {', '.join(map(repr, self.inits))}"
            )
        super().__post_init__()

    def refuses(self, site: Site) -> str | None:
        if (reason := super().refuses(site)) is not None:
            return reason
        host = host_of(site)
        if (reason := host.why_not_dense()) is None and host.offloaded:
            reason = "accelerate has offloaded its weight"
        return reason and f"the norms of its rows need its numbers, but {reason}"

    def prepare(self, sites: Sequence[Site]) -> dict[str, tuple[Host, _Shape]]:
        patterns = Patterns(self.magnitude_only)
        used: set[Any] = set()
        plan = {}
        for site, (host, shape) in zip(sites, super().prepare(sites).values(), strict=True):
            hits = {h for name in site.names for h in patterns.matching(name)}
            used |= hits
            plan[site.name] = host, _Shape(shape.r, shape.alpha, not hits)
        for p in patterns.patterns:
            if p not in used:
                near = nearest(p, [s.name for s in sites])
                raise TargetError(f"magnitude_only: {p!r} matches none of the adapted modules{near}")
        return plan

    def build(self, site: Site, plan: dict[str, tuple[Host, _Shape]]) -> DoRAAdapter:
        return DoRAAdapter(*self.placed(site, plan), self)

    def check(self, site: Site, plan: dict[str, tuple[Host, _Shape]]) -> None:
        """Refuse ranks that buy nothing.

        Raises:
            ValueError: r is larger than the rank any change of the weight can have.
        """
        host, shape = plan[site.name]
        if shape.pair:
            self.check_rank(host, shape, host.rows)

    @classmethod
    def examples(cls) -> Sequence[DoRAConfig]:
        return (
            cls(r=2, targets="all-linear"),
            cls(r=2, alpha=5.0, rank_stabilized=True, init="gaussian", dropout=0.25, targets="all-linear"),
            cls(targets="all-linear", r=2, magnitude_only="**"),
        )

    # -- the file ---------------------------------------------------------------------------------------------------

    @classmethod
    def reads(cls, stored: Mapping[str, Any]) -> bool:
        return bool(stored.get("use_dora"))

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return (*super().tensor_endings(), _MAGNITUDE)

    @classmethod
    def today(cls, key: str) -> str:
        return key.removesuffix(".weight") if key.endswith(f".{_MAGNITUDE}.weight") else key

    def to_peft(self, adapters: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().to_peft(adapters), "use_dora": True}

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> DoRAConfig:
        for path, found in shapes.items():
            if _MAGNITUDE not in found:
                raise ValueError(f"use_dora is {stored['use_dora']!r}, but {path!r} has no {_MAGNITUDE}")
        alone = tuple(f"^{path}" for path, found in shapes.items() if set(found) == {_MAGNITUDE})
        return cls(**cls.stored_settings(stored, shapes), magnitude_only=alone)


@dataclass(frozen=True)
class _Shape(pairs.Shape):
    """Whether there is a pair beside the magnitude."""

    pair: bool = True


class DoRAAdapter(PairAdapter):
    """A pair, unless the site has none, and `lora_magnitude_vector: (out)`."""

    reads_base = True
    shape: _Shape
    norms: KeptNorms
    lora_magnitude_vector: nn.Parameter

    def __init__(self, host: Host, shape: _Shape, config: DoRAConfig):
        super().__init__(host, shape, config, norms=KeptNorms(), can_fuse=host.intact)
        if shape.pair:
            a, b = host.pair_shapes(shape.r)
            self.hold(config.dtype, {"lora_A": a, "lora_B": b})
        else:
            vars(self)["tensor_names"] = {}
        wide = torch.promote_types(config.dtype or host.dtype, torch.float32)
        self.hold(wide, {_MAGNITUDE: (host.rows * host.groups,)})

    # -- computing --------------------------------------------------------------------------------------------------

    def factors(self) -> tuple[Any, Any]:
        if self.shape.pair:
            return self._parameters["lora_A"], self._parameters["lora_B"]
        return self._no_pair()

    def _no_pair(self) -> tuple[Tensor, Tensor]:
        """A and B of rank 0."""
        a, b = self.host.pair_shapes(0)
        empty = self.lora_magnitude_vector.detach()
        return empty.new_empty(a), empty.new_empty(b)

    def gain(self, weight: Tensor) -> Tensor:
        """m / n: (out), for the base's weight; differentiable by m."""
        n = self.norms.of(self.host, weight, *self.factors(), self.scale)
        m: Any = self._parameters[_MAGNITUDE]
        return m.to(n.dtype) / n

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around anything: the base's own product is computed once more, and this adapter's change is added."""
        y = base(*args, **kwargs)
        x, host, weight = args[0] if args else next(iter(kwargs.values())), self.host, self.host.base_weight
        g = self.gain(weight)
        g = g.view(-1, *(1,) * (-1 - host.feature_axis))
        product = host.apply(x.to(weight.device), weight, None)
        change = (g - 1) * product
        if self.shape.pair:
            p = self.dropout if self.training else 0.0
            change = change + g * host.add_low_rank(x, torch.zeros_like(product), *self.factors(), self.scale, p)
        return (y + change.to(y.device)).to(y.dtype)

    def fused(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        held = module._parameters
        weight: Any = held.get("weight")
        if type(weight) not in pairs.PLAIN or graft_of(module).kept:  # type: ignore[union-attr]
            return self.forward(underneath(module), *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        p, bias = self.dropout if self.training else 0.0, held.get("bias")
        if self._folds(x, weight, p):
            return self._folded(x, weight, bias)
        g = self.gain(weight)
        if not isinstance(self.host, LinearHost):
            y = underneath(module)(*args, **kwargs)
            z = self.host.add_low_rank(x, y, *self.factors(), self.scale, p) if self.shape.pair else y
        else:
            w = weight.t() if self.transposed else weight
            if self.shape.pair:
                return dora_linear(x, w, bias, g, *self.factors(), self.scale, p)
            z = F.linear(x, w, bias)
        return rescale(z, g, bias, self.host.feature_axis, own=True)

    def _folds(self, x: Tensor, weight: Tensor, p: float) -> bool:
        """Whether there are few tokens, all is of one kind, and nothing but the output is wanted."""
        return (
            not torch.is_grad_enabled()
            and weight.is_cpu
            and isinstance(self.host, LinearHost)
            and x.numel() <= FEW * x.shape[-1]
            and weight.dtype.itemsize >= 4  # gains are fp32 at least
            and not p
            and self.shape.pair
            and x.dtype is weight.dtype is self._parameters["lora_B"].dtype  # type: ignore[union-attr]
            and x.device == weight.device == self._parameters["lora_B"].device  # type: ignore[union-attr]
            and not composed(weight)
            and not torch.is_autocast_enabled(weight.device.type)
        )

    def _folded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A few tokens, where every operator counts: `g ∘ (W x + bias) + (1 − g) ∘ bias + (A x) (g ∘ s·B)ᵀ`."""
        a, b = self.factors()
        m: Any = self._parameters[_MAGNITUDE]
        gain, shift, left = self.norms.folded(self.host, weight, a, b, m, bias, self.scale)
        y = F.linear(x, weight.t() if self.transposed else weight, bias)
        y = y.mul_(gain) if shift is None else torch.addcmul(shift, y, gain, out=y)
        y.view(-1, y.shape[-1]).addmm_(F.linear(x, a).view(-1, a.shape[0]), left)
        return y

    # -- the weight -------------------------------------------------------------------------------------------------

    def why_not_merge(self) -> str | None:
        return self.host.why_not_merge()

    def delta(self, name: str) -> Tensor:
        return self._change().to(self.host.weight.dtype)

    def applied(self, name: str, weight: Tensor) -> Tensor:
        return (weight + self._change()).to(weight.dtype)

    def _change(self) -> Tensor:
        """`(g − 1) ∘ W + g ∘ s·BA` in the layout of the weight, in fp32 or wider; differentiable."""
        host, weight = self.host, self.host.base_weight
        g = self.gain(weight).view(host.groups, -1, 1)
        pieces = zip(host.matrices(weight), host.pair_matrices(*self.factors()), g, strict=True)
        return host.from_matrices([(g - 1) * w + (g * self.scale) * (b @ a) for w, (a, b), g in pieces])

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        fresh = target is base or not graft_of(self.host.module).merged  # type: ignore[union-attr]
        gain = self.gain(self.host.weight if fresh else base)  # the norms of the last forward, where they still hold
        self.host.rescale_(target, None if fresh else base, *self.factors(), self.scale, gain)

    # -- initial values -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `init` says, and the magnitude of every row its norm."""
        if not self.materialize():
            return
        if self.shape.pair:
            self.draw()
        weight = self.host.base_weight
        if not weight.is_meta:
            # one of the pair is zero; on a CPU the norms are those without it to the bit, and cheaper
            pair = self._no_pair() if weight.is_cpu else self.factors()
            n, _ = row_norms(*self.host.as_matrices(weight, *pair), self.scale)
            self.lora_magnitude_vector.copy_(n.reshape(-1))

    # -- the file -----------------------------------------------------------------------------------------------------

    def _stored(self, m: Tensor) -> Tensor:
        """As peft has it: (out), of a convolution (1 out 1 …)."""
        axis = -self.host.feature_axis
        return m if axis == 1 else m.view(1, -1, *(1,) * (axis - 1))

    def tensors(self) -> dict[str, Tensor]:
        pair = super().tensors() if self.shape.pair else {}
        return {**pair, _MAGNITUDE: self._stored(self.lora_magnitude_vector.detach())}

    def stored_shapes(self) -> dict[str, Sequence[torch.Size]]:
        pair = super().stored_shapes() if self.shape.pair else {}
        return {**pair, _MAGNITUDE: (self._stored(self.lora_magnitude_vector).shape,)}

    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        if self.shape.pair:
            a, b = self.stored_pair(found)
            if (reason := self.host.why_not_hold(a)) is not None:
                raise ValueError(f"no magnitude can be relative to the pair at {self.host.name!r}: {reason}")
            self.take("lora_A", a)
            self.take("lora_B", b)
        self.take(_MAGNITUDE, found[_MAGNITUDE].reshape(-1))

    def extra_repr(self) -> str:
        return super().extra_repr() if self.shape.pair else "magnitude only"
