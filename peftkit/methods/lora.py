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

from peftkit import leading, pairs, peft_lora, row_blocks
from peftkit.graft import underneath
from peftkit.hosts import EmbeddingHost, Host, LinearHost, host_of, why_no_host
from peftkit.kernels.lora_linear import lora_linear
from peftkit.method import Adapter, Config
from peftkit.sites import Site
from peftkit.targets import PerSite, TargetError

INITS = ("kaiming", "gaussian", *leading.INITS)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config, method="lora", peft_type="LORA"):
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

    r: int | Mapping[str, int] = 8
    alpha: float | Mapping[str, float] | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    rank_stabilized: bool = False
    dtype: torch.dtype | None = None
    rows: Mapping[str, row_blocks.Blocks] | None = None

    default_targets: ClassVar[Sequence[str]] = ("attention", "mlp")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "alpha", "rows"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(value))
        pairs.check_settings(self.r, self.alpha, self.dropout)
        if self.init not in INITS:
            raise ValueError(f"init: one of {', '.join(map(repr, INITS))}, not {self.init!r}")
        if self.init in leading.INITS and self.dropout:
            raise ValueError(
                f"dropout: 0 with init={self.init!r}, whose frozen pair must see the input of the trained one"
            )
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"dtype: a floating-point dtype, not {self.dtype}")

    @property
    def identity(self) -> Literal["bits", "rounding"]:
        return "rounding" if self.init in leading.INITS else "bits"  # of s(BA − B₀A₀)

    def refuses(self, site: Site) -> str | None:
        return why_no_host(site)

    def prepare(self, sites: Sequence[Site]) -> dict[str, tuple[Host, _Shape]]:
        r, alpha = PerSite(self.r, "r"), PerSite(self.alpha, "alpha")
        rows = PerSite({**self.rows, "**": ()} if self.rows else (), "rows")
        plan = {}
        for site in sites:
            rank, blocks = r.at(site), tuple((int(a), int(b)) for a, b in rows.at(site))
            plan[site.name] = host_of(site), _Shape(rank, float(alpha.at(site) or rank), blocks)
        names = [s.name for s in sites]
        for values in (r, alpha, rows):
            values.finish(names)
        return plan

    def build(self, site: Site, plan: dict[str, tuple[Host, _Shape]]) -> LoRAAdapter:
        host, shape = plan[site.name]
        if self.dropout and host.read:
            raise TargetError(
                f"dropout={self.dropout} cannot be applied at {site.name!r}: MultiheadAttention reads the weight, so "
                "there is no input to drop; set dropout=0.0 or exclude it"
            )
        row_blocks.check(shape.blocks, host)
        return LoRAAdapter(host, shape, self)

    def check(self, site: Site, plan: dict[str, tuple[Host, _Shape]]) -> None:
        """Refuse ranks that buy nothing.

        Raises:
            ValueError: r is larger than the rank any change of the weight can have.
        """
        host, shape = plan[site.name]
        if self.init in leading.INITS and (reason := leading.why_not(host)) is not None:
            raise TargetError(f"init={self.init!r} cannot start from the weight at {site.name!r}: {reason}")
        if self.init == "pissa" and shape.alpha < 0:
            raise ValueError(
                f"alpha={shape.alpha} at {site.name!r}: PiSSA divides singular values by the scale; give a positive one"
            )
        rows = min((b - a for a, b in shape.blocks), default=host.rows)
        largest = min(rows, host.cols) * host.groups
        if shape.r > largest:
            raise ValueError(
                f"r={shape.r} at {site.name!r} exceeds {largest}, the largest rank a change of its "
                f"({host.rows * host.groups}, {host.cols}) weight can have; lower r there, as in "
                f"r={{'*': {shape.r}, {site.name!r}: {largest}}}, or exclude it"
            )

    @classmethod
    def examples(cls) -> Sequence[LoRAConfig]:
        return (
            cls(r=2, targets="all-linear"),
            cls(r=3, alpha=5.0, rank_stabilized=True, init="gaussian", targets="all-linear"),
            cls(r=1, init="pissa", targets="all-linear"),
            cls(r=2, dropout=0.25, targets="all-linear"),
        )

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        made = {path: a for path, a in adapters.items() if isinstance(a, LoRAAdapter)}
        return peft_lora.settings(
            {path: a.as_plain() for path, a in made.items()},
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            fan_in_fan_out=any(a.transposed for a in made.values()),
        )

    @classmethod
    def check_peft(cls, stored: Mapping[str, Any]) -> None:
        peft_lora.check(stored, cls.__name__)

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> LoRAConfig:
        init = stored.get("init_lora_weights", True)
        return cls(
            **peft_lora.ranks_and_alphas(stored, shapes),
            dropout=float(stored.get("lora_dropout") or 0.0),
            init=init if init in leading.INITS else "kaiming",
            rank_stabilized=bool(stored.get("use_rslora", False)),
            targets=tuple(f"^{path}" for path in shapes),
        )


@dataclass(frozen=True)
class _Shape:
    """Rank, alpha and row blocks of one site."""

    r: int
    alpha: float
    blocks: tuple[tuple[int, int], ...] = ()


_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_EMBEDDING_NAMES = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


class LoRAAdapter(Adapter):
    """One pair. `lora_A: (r in)` — stacked for several row blocks — and `lora_B: (out r)`; a convolution's have its
    kernel's dimensions. `frozen_A` and `frozen_B` are the initial pair where the method subtracts it.
    """

    fast = ("lora_B",)
    host: Host
    shape: _Shape
    init: str
    dropout: float
    scale: float
    rank_stabilized: bool
    subtracts: bool
    transposed: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    frozen_A: nn.Parameter
    frozen_B: nn.Parameter

    def __init__(self, host: Host, shape: _Shape, config: LoRAConfig):
        super().__init__()
        embedding, subtracts = isinstance(host, EmbeddingHost), config.init in leading.INITS
        vars(self).update(  # at once, since nn.Module's __setattr__ would take longer than all the rest
            host=host,
            shape=shape,
            init=config.init,
            dropout=config.dropout,
            scale=shape.alpha / (math.sqrt(shape.r) if config.rank_stabilized else shape.r),
            rank_stabilized=config.rank_stabilized,
            subtracts=subtracts,
            transposed=getattr(host, "transposed", False),
            can_fuse=host.intact and isinstance(host, LinearHost) and not shape.blocks and not subtracts,
            merges=(host.weight_name,) if host.intact or host.why_not_dense() is None else (),
            tensor_names=_EMBEDDING_NAMES if embedding else _NAMES,
        )
        base = host.dtype
        dtype = config.dtype or (base if base.itemsize >= 4 else torch.float32)
        a, b = host.pair_shapes(shape.r)
        if shape.blocks:
            a = (shape.r * len(shape.blocks), *a[1:])
            b = (sum(stop - start for start, stop in shape.blocks), shape.r)
        device = host.device
        trained, frozen = (("lora_A", a), ("lora_B", b)), (("frozen_A", a), ("frozen_B", b)) if subtracts else ()
        for name, size in (*trained, *frozen):
            values = torch.empty(size, device=device, dtype=dtype)
            self._parameters[name] = nn.Parameter(values, name.startswith("lora"))

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
        if type(weight) not in _PLAIN:  # quantised, sharded or parametrized since it was attached
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
        if self.lora_A.is_meta and (device := self.host.device).type != "meta":
            for name, p in self._parameters.items():
                assert p is not None
                self._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        a, b = self.lora_A, self.lora_B
        if a.is_meta:
            return
        if self.init in leading.INITS:
            self._start_from_base()
        else:
            pairs.draw_(a, b, self.init, self.shape.r, embedding=isinstance(self.host, EmbeddingHost))

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

    @property
    def halved(self) -> bool:
        """Whether B is stored as B/2: peft, whose file this is, adds the pair of MultiheadAttention's out_proj twice."""
        return self.host.read and self.host.weight_name == "weight"

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        a, b = self.factors()
        b = b / 2 if self.halved else b
        return {self.tensor_names["lora_A"]: self.host.to_stored(a.detach()), self.tensor_names["lora_B"]: b.detach()}

    def stored_shapes(self) -> dict[str, Sequence[torch.Size]]:
        a, b = self.factors() if self.shape.blocks or self.subtracts else (self.lora_A, self.lora_B)
        key_a, key_b = self.tensor_names.values()
        if not self.subtracts:
            return {key_a: (self.host.to_stored(a).shape,), key_b: (b.shape,)}
        # peft stores the trained pair alone, relative to a base that it changes
        return {key_a: (a.shape, self.lora_A.shape), key_b: (b.shape, self.lora_B.shape)}

    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        a, b = self.host.from_stored(found[self.tensor_names["lora_A"]]), found[self.tensor_names["lora_B"]]
        b = b * 2 if self.halved else b
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

    def extra_repr(self) -> str:
        return f"r={self.shape.r}, alpha={self.shape.alpha:g}" + (f", dropout={self.dropout}" if self.dropout else "")


_PLAIN = (nn.Parameter, Tensor)
