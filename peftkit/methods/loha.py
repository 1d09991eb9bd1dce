"""LoHa: the Hadamard product of two low-rank pairs (FedPara, Hyeon-Woo et al., arXiv 2108.06098; LyCORIS, Yeh et al.,
arXiv 2309.14859).

`ΔW = α/r · (w1a w1b) ⊙ (w2a w2b)`, of rank up to r² with the parameters of two pairs of rank r. A convolution's weight
is taken as the matrix `out (in/groups · kernel)`. The references differ in which factor is zero at the start: peft's
`w2b`, with the others uniform (here too), or LyCORIS's `w2a`, with the others normal (`init="lycoris"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.dtypes import own_dtype
from peftkit.lycoris import KERNELS, FactoredAdapter, FactoredConfig, Plan, kaiming_
from peftkit.sites import Site

INITS = ("peft", "lycoris")


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(FactoredConfig, method="loha", peft_type="LOHA"):
    """LoHa (arXiv 2108.06098, 2309.14859).

    Args:
        r: rank of both pairs, or ranks by pattern.
        alpha: the scale is `alpha / r`; None is `alpha = r`. By pattern as well.
        init: `"peft"`: uniform in ±1/√fan_in, w2b zero; `"lycoris"`: w1b and w2b from N(0, 1), w1a from N(0, 0.1²),
            w2a zero.
        dtype: of the factors; None is fp32 over a half-precision base and the base's own dtype otherwise. The product
            is computed in the base's dtype.

    Raises:
        ValueError: a rank below 1, an alpha that is zero or no finite number, an unknown init.
    """

    init: str = "peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init: one of {', '.join(map(repr, INITS))}, not {self.init!r}")

    def build(self, site: Site, plan: Mapping[str, Plan]) -> LoHaAdapter:
        return LoHaAdapter(plan[site.name], self)

    @classmethod
    def examples(cls) -> Sequence[LoHaConfig]:
        return (
            cls(r=2, alpha=5.0, targets="all-linear"),
            cls(r=1, targets="all-linear"),
            cls(r=7, init="lycoris", targets="all-linear"),
        )

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return (*LoHaAdapter.tensor_names, *KERNELS[:2])


class LoHaAdapter(FactoredAdapter):
    """`hada_w1_a`, `hada_w2_a`: `(out r)`; `hada_w1_b`, `hada_w2_b`: `(r in)`, of a convolution `(r in/groups·kernel)`."""

    tensor_names = {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    init: str
    as_pair: bool
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, plan: Plan, config: LoHaConfig):
        host, r = plan.host, plan.r
        # multiplications for a row of the input: r²(in + out) through the pair, in·out through ΔW
        super().__init__(plan, init=config.init, as_pair=r * r * (host.rows + host.cols) < host.rows * host.cols)
        a, b = (host.groups * host.rows, r), (r, host.cols)
        shapes = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        self.make(shapes, own_dtype(host.dtype, config.dtype))

    def draw(self) -> None:
        first, second = (self.hada_w1_a, self.hada_w1_b), (self.hada_w2_a, self.hada_w2_b)
        if self.init == "lycoris":
            first[0].normal_(std=0.1)
            first[1].normal_()
            second[0].zero_()
            second[1].normal_()
            return
        for t in (*first, second[0]):
            kaiming_(t)
        second[1].zero_()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.host.add_low_rank(x, y, *self.pair(), self.scale, 0.0) if self.as_pair else super().add(x, y)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of the one plain pair of rank r² that has the same product, in the host's shapes.

        `(w1a w1b) ⊙ (w2a w2b) = (w1a ∗ w2a) (w1b ∗ w2b)`, with all products of two columns on the left and of two
        rows on the right (Khatri-Rao).
        """
        rank, groups = self.r * self.r, self.host.groups
        b = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None, :]).flatten(1)
        a = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).flatten(0, 1)
        shape_a, shape_b = self.host.pair_shapes(rank * groups)
        return a.repeat(groups, 1).reshape(shape_a), b.reshape(shape_b)

    def change(self) -> Tensor:
        return hadamard(self.hada_w1_a * self.scale, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)


def hadamard(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """`(a b) ⊙ (c d)` for a, c: `(m r)` and b, d: `(r n)`, keeping these alone for the way back."""
    apply: Any = _Hadamard.apply
    return apply(a, b, c, d)


class _Hadamard(torch.autograd.Function):
    """Both products are computed again on the way back."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (a @ b).mul_(c @ d)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a, b, c, d = ctx.saved_tensors
        left, right = grad * (c @ d), grad * (a @ b)
        return left @ b.t(), a.t() @ left, right @ d.t(), c.t() @ right
