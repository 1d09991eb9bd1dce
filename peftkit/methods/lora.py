"""LoRA: a low-rank pair beside every adapted weight (Hu et al., arXiv 2106.09685).

`y = W x + bias + s · B A drop(x)`, `s = α/r`, or `α/√r` rank-stabilised (Kalajdzievski, arXiv 2312.03732). Merged,
`W + s · B A`. Where the paper's text draws A from a Gaussian, its code and everybody since draws it uniformly from
`±1/√in`; both are here. Adaptation of an embedding starts with A at zero and B drawn, as in the paper's code.

PiSSA (Meng et al., arXiv 2404.02948) and OLoRA (Büyükakyüz, arXiv 2406.01775) start from the weight's own leading
singular vectors, or its QR factors, and are published as a change of the base: `W − s B₀A₀` is frozen. Here W stays as
it is and the frozen pair is subtracted in the adapter, `s (B A − B₀ A₀)`: the same function, but the base can be
shared, unmerged exactly, and the stored adapter is a plain LoRA of rank 2r on the base that everybody has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftkit import leading, pairs, row_blocks
from peftkit.graft import underneath
from peftkit.hosts import Host, LinearHost
from peftkit.kernels.lora_linear import lora_linear
from peftkit.pairs import PairAdapter, PairConfig
from peftkit.sites import Site
from peftkit.targets import PerSite, TargetError


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(PairConfig, method="lora", peft_type="LORA"):
    """LoRA (arXiv 2106.09685).

    Args:
        r: rank, or ranks by pattern. For a grouped convolution it counts all groups together.
        alpha: `s = alpha / r`; None is `alpha = r`. By pattern as well.
        dropout: probability of dropping an entry of A's input in training. Embeddings, as elsewhere, know none.
        init: `"kaiming"`, `"gaussian"` (std 1/r), `"pissa"` or `"olora"`.
        rank_stabilized: `s = alpha / √r`.
        dtype: of A and B; None is fp32 over a half-precision base and the base's own dtype otherwise. The product is
            computed in the base's dtype.
        rows: for a Linear that is several in one, such as a fused qkv: pattern -> row blocks `(start, stop)` to
            adapt, each with a pair of its own of rank r.

    Raises:
        ValueError: a rank below 1, an alpha that is zero or no finite number, a dropout outside [0, 1), an unknown init.
    """

    rows: Mapping[str, row_blocks.Blocks] | None = None

    inits: ClassVar[Sequence[str]] = (*PairConfig.inits, *leading.INITS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rows, Mapping):
            object.__setattr__(self, "rows", dict(self.rows))
        if self.init in leading.INITS and self.dropout:
            raise ValueError(
                f"dropout: 0 with init={self.init!r}, whose frozen pair must see the input of the trained one"
            )

    @property
    def identity(self) -> Literal["bits", "rounding"]:
        return "rounding" if self.init in leading.INITS else "bits"  # of s(BA − B₀A₀)

    def prepare(self, sites: Sequence[Site]) -> dict[str, tuple[Host, _Shape]]:
        rows = PerSite({**self.rows, "**": ()} if self.rows else (), "rows")
        plan = {}
        for site, (host, shape) in zip(sites, super().prepare(sites).values(), strict=True):
            blocks = tuple((int(a), int(b)) for a, b in rows.at(site))
            plan[site.name] = host, _Shape(shape.r, shape.alpha, blocks)
        rows.finish([s.name for s in sites])
        return plan

    def build(self, site: Site, plan: dict[str, tuple[Host, _Shape]]) -> LoRAAdapter:
        host, shape = self.placed(site, plan)
        row_blocks.check(shape.blocks, host)
        return LoRAAdapter(host, shape, self)

    def check(self, site: Site, plan: dict[str, tuple[Host, _Shape]]) -> None:
        """Refuse what cannot start, and ranks that buy nothing.

        Raises:
            ValueError: r is larger than the rank any change of the weight can have, or `init` has nothing to start from.
        """
        host, shape = plan[site.name]
        if self.init in leading.INITS and (reason := leading.why_not(host)) is not None:
            raise TargetError(f"init={self.init!r} cannot start from the weight at {site.name!r}: {reason}")
        if self.init == "pissa" and shape.alpha < 0:
            raise ValueError(
                f"alpha={shape.alpha} at {site.name!r}: PiSSA divides singular values by the scale; give a positive one"
            )
        self.check_rank(host, shape, min((b - a for a, b in shape.blocks), default=host.rows))

    @classmethod
    def examples(cls) -> Sequence[LoRAConfig]:
        return (
            cls(r=2, targets="all-linear"),
            cls(r=3, alpha=5.0, rank_stabilized=True, init="gaussian", targets="all-linear"),
            cls(r=1, init="pissa", targets="all-linear"),
            cls(r=2, dropout=0.25, targets="all-linear"),
        )

    @classmethod
    def reads(cls, stored: Mapping[str, Any]) -> bool:
        return not stored.get("use_dora")


@dataclass(frozen=True)
class _Shape(pairs.Shape):
    """The row blocks of one site too."""

    blocks: tuple[tuple[int, int], ...] = ()


class LoRAAdapter(PairAdapter):
    """One pair, or a pair stacked for several row blocks. `frozen_A` and `frozen_B` are the initial pair where the
    method subtracts it.
    """

    shape: _Shape
    subtracts: bool
    frozen_A: nn.Parameter
    frozen_B: nn.Parameter

    def __init__(self, host: Host, shape: _Shape, config: LoRAConfig):
        subtracts = config.init in leading.INITS
        fusible = host.intact and isinstance(host, LinearHost) and not shape.blocks and not subtracts
        super().__init__(host, shape, config, subtracts=subtracts, can_fuse=fusible)
        a, b = host.pair_shapes(shape.r)
        if shape.blocks:
            a = (shape.r * len(shape.blocks), *a[1:])
            b = (sum(stop - start for start, stop in shape.blocks), shape.r)
        self.hold(config.dtype, {"lora_A": a, "lora_B": b}, {"frozen_A": a, "frozen_B": b} if subtracts else {})

    # -- computing --------------------------------------------------------------------------------------------------

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the one plain pair that this adapter amounts to."""
        a, b = self.lora_A, self._in_place(self.lora_B)
        if self.subtracts:
            a, b = torch.cat([a, self.frozen_A]), torch.cat([b, -self._in_place(self.frozen_B)], dim=1)
        return a, b

    def _in_place(self, b: Tensor) -> Tensor:
        return row_blocks.spread(b, self.shape.blocks, self.shape.r, self.host.rows)

    def _stacked(self, b: Tensor) -> Tensor:
        return row_blocks.stacked(b, self.shape.blocks, self.shape.r)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        a, b = self.factors()
        return self.host.add_low_rank(x, y, a, b, self.scale, self.dropout if self.training else 0.0)

    def fused(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        own = self._parameters
        return self._fused(module, own["lora_A"], own["lora_B"], *args, **kwargs)

    @classmethod
    def fused_together(cls, adapters: Sequence[LoRAAdapter], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Pairs side by side are one pair, of their ranks together. With dropout each draws a mask of its own."""
        first, places = adapters[0], {a.lora_A.device for a in adapters}
        if any(a.dropout and a.training for a in adapters) or len(places) > 1:
            return super().fused_together(adapters, module, *args, **kwargs)
        a, b, _ = pairs.side_by_side([(a.lora_A, a.lora_B, a.scale) for a in adapters])
        return first._fused(module, a, b, *args, **kwargs)

    def _fused(self, module: nn.Module, lora_a: Any, lora_b: Any, *args: Any, **kwargs: Any) -> Tensor:
        held = module._parameters
        weight: Any = held.get("weight")
        x = args[0] if args else next(iter(kwargs.values()))
        p = self.dropout if self.training else 0.0
        if type(weight) not in pairs.PLAIN:  # quantised, sharded or parametrized since it was attached
            y = underneath(module)(*args, **kwargs)
            return self.host.add_low_rank(x, y, lora_a, lora_b, self.scale, p)
        if self.transposed:
            weight = weight.t()
        return lora_linear(x, weight, held["bias"], lora_a, lora_b, self.scale, p)

    # -- merging ----------------------------------------------------------------------------------------------------

    def why_not_merge(self) -> str | None:
        return self.host.why_not_merge() or self.host.why_not_hold(self.lora_A)

    def delta(self, name: str) -> Tensor:
        a, b = self.factors()
        return self.host.dense(a, b, self.scale).to(self.host.weight.dtype)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        self.host.add_pair_(target, *self.factors(), self.scale)

    # -- initial values -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `init` says. Adapters made on the meta device are put where their host is."""
        if not self.materialize():
            return
        if self.init in leading.INITS:
            self._start_from_base()
        else:
            self.draw()

    def _start_from_base(self) -> None:
        weight, blocks = self.host.matrices(self.host.weight)[0], self.shape.blocks or ((0, self.host.rows),)
        a, b = leading.stacked(weight, blocks, self.shape.r, self.init, self.scale)
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.frozen_A.copy_(self.lora_A)
        self.frozen_B.copy_(self.lora_B)

    # -- the file -----------------------------------------------------------------------------------------------------

    def as_plain(self) -> tuple[int, float]:
        """Rank and alpha of the plain pair of the same scale."""
        r, times = self.shape.r, max(1, len(self.shape.blocks)) * (2 if self.subtracts else 1)
        return r * times, self.shape.alpha * (math.sqrt(times) if self.rank_stabilized else times)

    def stored_shapes(self) -> dict[str, Sequence[torch.Size]]:
        if not self.subtracts:
            return super().stored_shapes()
        # peft stores the trained pair alone, relative to a base that it changes
        own = self.lora_A.shape, self.lora_B.shape
        return {key: (whole.shape, alone) for (key, whole), alone in zip(self.tensors().items(), own, strict=True)}

    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        a, b = self.stored_pair(found)
        if self.subtracts and a.shape[0] == self.lora_A.shape[0]:
            if (reason := leading.why_not(self.host)) is not None:
                raise ValueError(f"init={self.init!r} is relative to the weight at {self.host.name!r}, but {reason}")
            self._start_from_base()
        elif self.subtracts:
            n, m = a.shape[0] // 2, b.shape[1] // 2
            self.take("frozen_A", a[n:].clone())
            self.take("frozen_B", -self._stacked(b[:, m:]))
            a, b = a[:n].clone(), b[:, :m]
        self.take("lora_A", a)
        self.take("lora_B", self._stacked(b))
