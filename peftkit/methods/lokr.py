"""LoKr: a Kronecker product (KronA, Edalati et al., arXiv 2212.10650; LyCORIS, Yeh et al., arXiv 2309.14859).

`ΔW = α/r · (w1 ⊗ w2)` with `w1: (out₁ in₁)`, `w2: (out₂ in₂ *kernel)` and `out = out₁ out₂`, `in = in₁ in₂`, the first
the smaller. w2, and with `decompose_both` w1, is itself a product of rank r where r is below half of its larger side.
The product with an input never forms ΔW at a Linear: as `in₁ × in₂` blocks, `X ↦ w1 X w2ᵀ`.

The references differ in what is zero at the start: peft's w1 (here too), or LyCORIS's w2 (`init="lycoris"`). As in
peft, alpha/r scales the product even where neither factor is decomposed; LyCORIS's code takes 1 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.dtypes import own_dtype
from peftkit.hosts import ConvHost, LinearHost, host_class
from peftkit.lycoris import KERNELS, FactoredAdapter, FactoredConfig, Plan, kaiming_
from peftkit.method import Adapter
from peftkit.sites import Site

INITS = ("peft", "lycoris")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(FactoredConfig, method="lokr", peft_type="LOKR"):
    """LoKr (arXiv 2212.10650, 2309.14859).

    Args:
        r: rank of the decomposed factors, or ranks by pattern.
        alpha: the scale is `alpha / r`; None is `alpha = r`. By pattern as well.
        factor: size of w1's sides, where it divides them, else the nearest below that does; -1 is near the root.
        decompose_both: decompose w1 as well.
        init: `"peft"`: w1 zero; `"lycoris"`: w2 zero; the others uniform in ±1/√fan_in.
        dtype: of the factors; None is fp32 over a half-precision base and the base's own dtype otherwise. The product
            is computed in the base's dtype.

    Raises:
        ValueError: a rank below 1, an alpha that is zero or no finite number, an unknown init, a factor that is
            neither positive nor -1.
    """

    factor: int = -1
    decompose_both: bool = False
    init: str = "peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init: one of {', '.join(map(repr, INITS))}, not {self.init!r}")
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or (self.factor < 1 and self.factor != -1):
            raise ValueError(f"factor: a positive integer, or -1 for near the root, not {self.factor!r}")

    def refuses(self, site: Site) -> str | None:
        if host_class(site) is ConvHost and not isinstance(site.module, nn.Conv2d):
            return "it is no Linear or Conv2d, for which alone the file format is sound"
        return super().refuses(site)

    def build(self, site: Site, plan: Mapping[str, Plan]) -> LoKrAdapter:
        return LoKrAdapter(plan[site.name], self)

    @classmethod
    def examples(cls) -> Sequence[LoKrConfig]:
        return (
            cls(r=1, alpha=0.5, targets="all-linear"),
            cls(r=1, factor=2, decompose_both=True, targets="all-linear"),
            cls(r=8, init="lycoris", targets="all-linear"),
        )

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", *KERNELS[2:])

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {
            **super().to_peft(adapters),
            "decompose_both": self.decompose_both,
            "decompose_factor": self.factor,
            "rank_dropout_scale": False,
            "init_weights": True if self.init == "peft" else self.init,
        }

    @classmethod
    def own_fields(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "factor": stored.get("decompose_factor", -1),
            "decompose_both": bool(stored.get("decompose_both", False)),
            "init": "lycoris" if stored.get("init_weights") == "lycoris" else "peft",
        }


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `size`, as in LyCORIS and peft: `factor` and the other where it divides; else the pair nearest to
    the root whose first does not exceed it; -1 is the pair nearest to the root. But for the first case, the smaller
    comes first.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = size if factor == -1 else factor
    divisors = [m for m in range(1, int(size**0.5) + 1) if size % m == 0 and m <= largest]
    return divisors[-1], size // divisors[-1]


class LoKrAdapter(FactoredAdapter):
    """`lokr_w1`: `(out₁ in₁)`, or `lokr_w1_a`: `(out₁ r)` and `lokr_w1_b`: `(r in₁)`; `lokr_w2`: `(out₂ in₂ *kernel)`,
    or `lokr_w2_a`: `(out₂ r)` and `lokr_w2_b`: `(r in₂·kernel)`.
    """

    init: str

    def __init__(self, plan: Plan, config: LoKrConfig):
        super().__init__(plan, init=config.init)
        host, r = plan.host, plan.r
        kernel = tuple(host.module.kernel_size) if isinstance(host, ConvHost) else ()
        out1, out2 = factorization(host.rows * host.groups, config.factor)
        in1, in2 = factorization(host.cols // torch.Size(kernel).numel(), config.factor)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rows, cols, low in (("lokr_w1", out1, in1, config.decompose_both), ("lokr_w2", out2, in2, True)):
            more = kernel if name == "lokr_w2" else ()
            if low and r < max(rows, cols) / 2:
                shapes |= {f"{name}_a": (rows, r), f"{name}_b": (r, cols * torch.Size(more).numel())}
            else:
                shapes[name] = (rows, cols, *more)
        self.make(shapes, own_dtype(host.dtype, config.dtype))
        vars(self)["tensor_names"] = {name: name for name in shapes}

    def draw(self) -> None:
        zero = "lokr_w1" if self.init == "peft" else "lokr_w2"
        for name, p in self._parameters.items():
            assert p is not None
            kaiming_(p)
            # of a product one side is enough: peft's left of w1, LyCORIS's right of w2
            if name == zero or name == zero + ("_a" if self.init == "peft" else "_b"):
                p.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """w1: `(out₁ in₁)`, scaled, and w2: `(out₂ in₂·kernel)`."""
        own = self._parameters
        w1, w2 = (own[n] if n in own else own[f"{n}_a"] @ own[f"{n}_b"] for n in ("lokr_w1", "lokr_w2"))  # type: ignore[operator]
        return w1 * self.scale, w2.flatten(1)  # type: ignore[operator, union-attr]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(self.host, LinearHost):
            return super().add(x, y)
        w1, w2 = self.factors()
        return y + through_factors(x.to(device=w1.device, dtype=y.dtype), w1.to(y.dtype), w2.to(y.dtype)).to(y.device)

    def change(self) -> Tensor:
        return torch.kron(*self.factors())


def through_factors(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`x (w1 ⊗ w2)ᵀ` for x: `(... in₁·in₂)` without the product, in the order with fewer multiplications."""
    (out1, in1), (out2, in2) = w1.shape, w2.shape
    blocks = x.unflatten(-1, (in1, in2))
    if in1 * out2 * (in2 + out1) <= out1 * in2 * (in1 + out2):
        return (w1 @ (blocks @ w2.t())).flatten(-2)
    return ((w1 @ blocks) @ w2.t()).flatten(-2)
