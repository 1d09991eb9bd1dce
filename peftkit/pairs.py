"""Low-rank pairs, whatever method they belong to: their settings, initial values, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit import peft_lora
from peftkit.dtypes import check_dtype, own_dtype
from peftkit.hosts import EmbeddingHost, Host, host_of, why_no_host
from peftkit.method import Adapter, Config
from peftkit.sites import Site
from peftkit.targets import PerSite, TargetError

PLAIN = (nn.Parameter, Tensor)  # weights that a method may compute with itself; others are quantised, sharded, …


@dataclass(frozen=True)
class Shape:
    """Rank and alpha of one site's pair."""

    r: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class PairConfig(Config):
    """What the methods of low-rank pairs `s · BA` have in common.

    Args:
        r: rank, or ranks by pattern. For a grouped convolution it counts all groups together.
        alpha: `s = alpha / r`; None is `alpha = r`. By pattern as well.
        dropout: probability of dropping an entry of A's input in training. Embeddings, as elsewhere, know none.
        init: how A and B start, one of the method's `inits`.
        rank_stabilized: `s = alpha / √r`.
        dtype: of A and B; None is fp32 over a half-precision base and the base's own dtype otherwise. The product is
            computed in the base's dtype.

    Raises:
        ValueError: a rank below 1, an alpha that is zero or no finite number, a dropout outside [0, 1), an unknown init.
    """

    r: int | Mapping[str, int] = 8
    alpha: float | Mapping[str, float] | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    rank_stabilized: bool = False
    dtype: torch.dtype | None = None

    default_targets: ClassVar[Sequence[str]] = ("attention", "mlp")
    inits: ClassVar[Sequence[str]] = ("kaiming", "gaussian")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "alpha"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(value))
        check_settings(self.r, self.alpha, self.dropout)
        if self.init not in self.inits:
            raise ValueError(f"init: one of {', '.join(map(repr, self.inits))}, not {self.init!r}")
        check_dtype(self.dtype)

    def refuses(self, site: Site) -> str | None:
        return why_no_host(site)

    def prepare(self, sites: Sequence[Site]) -> dict[str, tuple[Host, Any]]:
        r, alpha = PerSite(self.r, "r"), PerSite(self.alpha, "alpha")
        plan = {}
        for site in sites:
            rank = r.at(site)
            plan[site.name] = host_of(site), Shape(rank, float(alpha.at(site) or rank))
        names = [s.name for s in sites]
        for values in (r, alpha):
            values.finish(names)
        return plan

    def placed(self, site: Site, plan: Mapping[str, tuple[Host, Any]]) -> tuple[Host, Any]:
        """The host at `site` and the shape of its pair.

        Raises:
            TargetError: dropout where there is no input to drop.
        """
        host, shape = plan[site.name]
        if self.dropout and host.read:
            raise TargetError(
                f"dropout={self.dropout} cannot be applied at {site.name!r}: MultiheadAttention reads the weight, so "
                "there is no input to drop; set dropout=0.0 or exclude it"
            )
        return host, shape

    def check_rank(self, host: Host, shape: Shape, rows: int) -> None:
        """Refuse a rank that buys nothing.

        Raises:
            ValueError: r is larger than the rank any change of these rows of the weight can have.
        """
        largest = min(rows, host.cols) * host.groups
        if shape.r > largest:
            raise ValueError(
                f"r={shape.r} at {host.name!r} exceeds {largest}, the largest rank a change of its "
                f"({host.rows * host.groups}, {host.cols}) weight can have; lower r there, as in "
                f"r={{'*': {shape.r}, {host.name!r}: {largest}}}, or exclude it"
            )

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        made = {path: a for path, a in adapters.items() if isinstance(a, PairAdapter)}
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
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> PairConfig:
        return cls(**cls.stored_settings(stored, shapes))

    @classmethod
    def stored_settings(
        cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]
    ) -> dict[str, Any]:
        """The arguments that `adapter_config.json` gives, for the tensors of these shapes by module path."""
        init = stored.get("init_lora_weights", True)
        return {
            **peft_lora.ranks_and_alphas(stored, shapes),
            "dropout": float(stored.get("lora_dropout") or 0.0),
            "init": init if init in peft_lora.FROM_BASE else "kaiming",
            "rank_stabilized": bool(stored.get("use_rslora", False)),
            "targets": tuple(f"^{path}" for path in shapes),
        }


_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_EMBEDDING_NAMES = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


class PairAdapter(Adapter):
    """One pair. `lora_A: (r in)` and `lora_B: (out r)`; a convolution's have its kernel's dimensions."""

    fast = ("lora_B",)
    host: Host
    shape: Any
    init: str
    dropout: float
    scale: float
    rank_stabilized: bool
    transposed: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, host: Host, shape: Shape, config: PairConfig, **own: Any):
        super().__init__()
        vars(self).update(  # at once, since nn.Module's __setattr__ would take longer than all the rest
            host=host,
            shape=shape,
            init=config.init,
            dropout=config.dropout,
            scale=shape.alpha / (math.sqrt(shape.r) if config.rank_stabilized else shape.r),
            rank_stabilized=config.rank_stabilized,
            transposed=getattr(host, "transposed", False),
            merges=(host.weight_name,) if host.intact or host.why_not_dense() is None else (),
            tensor_names=_EMBEDDING_NAMES if isinstance(host, EmbeddingHost) else _NAMES,
            **own,
        )

    def hold(
        self, dtype: torch.dtype | None, sizes: Mapping[str, Sequence[int]], frozen: Mapping[str, Sequence[int]] = {}
    ) -> None:
        """Make the parameters, not yet drawn, where the host computes; `dtype` as the config has it."""
        dtype, device = own_dtype(self.host.dtype, dtype), self.host.device
        for trains, group in ((True, sizes), (False, frozen)):
            for name, size in group.items():
                values = torch.empty(size, device=device, dtype=dtype)
                self._parameters[name] = nn.Parameter(values, trains)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the one plain pair that this adapter amounts to."""
        return self.lora_A, self.lora_B

    # -- initial values -----------------------------------------------------------------------------------------------

    def materialize(self) -> bool:
        """Put parameters made on the meta device where the host is by now; whether they have memory."""
        device = self.host.device
        for name, p in self._parameters.items():
            assert p is not None
            if p.is_meta and device.type != "meta":
                self._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        return not any(p is not None and p.is_meta for p in self._parameters.values())

    def draw(self) -> None:
        """Initial values, of which one matrix is zero: B, or of an embedding A.

        `"gaussian"` has std 1/r; else A is uniform in ±1/√in.
        """
        a, b = self.lora_A, self.lora_B
        if isinstance(self.host, EmbeddingHost):
            a.zero_()
            b.normal_()
            return
        if self.init == "gaussian":
            a.normal_(std=1 / self.shape.r)
        else:
            bound = 1 / math.sqrt(a.numel() // a.shape[0])
            a.uniform_(-bound, bound)
        b.zero_()

    # -- the file -----------------------------------------------------------------------------------------------------

    def as_plain(self) -> tuple[int, float]:
        """Rank and alpha of the plain pair of the same scale."""
        return self.shape.r, self.shape.alpha

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
        a, b = self.factors()
        return {
            self.tensor_names["lora_A"]: (self.host.to_stored(a).shape,),
            self.tensor_names["lora_B"]: (b.shape,),
        }

    def stored_pair(self, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A and B of the tensors of a file."""
        a, b = self.host.from_stored(found[self.tensor_names["lora_A"]]), found[self.tensor_names["lora_B"]]
        return a, b * 2 if self.halved else b

    def extra_repr(self) -> str:
        return f"r={self.shape.r}, alpha={self.shape.alpha:g}" + (f", dropout={self.dropout}" if self.dropout else "")


def check_settings(r: int | Mapping[str, int], alpha: float | Mapping[str, float] | None, dropout: float) -> None:
    """Refuse what no pair can have.

    Raises:
        ValueError: a rank below 1, an alpha that is zero or no finite number, a dropout outside [0, 1).
    """
    for rank in r.values() if isinstance(r, Mapping) else [r]:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r: a rank is an integer of at least 1, not {rank!r}")
    for a in alpha.values() if isinstance(alpha, Mapping) else [alpha]:
        if a is not None and (isinstance(a, bool) or not math.isfinite(a) or a == 0):
            raise ValueError(f"alpha: a finite number other than 0, not {a!r}; with 0 or NaN nothing could be learned")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: a probability in [0, 1), not {dropout!r}")


def side_by_side(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Pairs `(A, B, scale)` as the one pair of their ranks together; differentiable. Scales go into B."""
    scale = pairs[0][2]
    b = [b if s == scale else b * (s / scale) for _, b, s in pairs]
    return torch.cat([a for a, _, _ in pairs]), torch.cat(b, dim=1), scale
