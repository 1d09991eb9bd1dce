"""VeRA: one random pair of matrices for all sites, and two small vectors of each site's own (Kopiczko et al.,
arXiv 2310.11454).

`y = W x + bias + b ⊙ (B (d ⊙ (A drop(x))))` (paper, eq. 2). A and B are drawn once from Kaiming's uniform
distribution and frozen; a site uses the first columns of A and the first rows of B. `d` starts at 0.1 and `b` at zero,
so nothing changes at attach. Merged, `W + diag(b) B diag(d) A`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import pairs
from peftkit.dtypes import check_dtype, own_dtype
from peftkit.hosts import Host, LinearHost, host_class, host_of, why_no_host
from peftkit.method import Adapter, Config
from peftkit.sites import Site
from peftkit.targets import TargetError
from peftkit.weight_change import WeightChange

_A, _B = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(Config, method="vera", peft_type="VERA"):
    """VeRA (arXiv 2310.11454).

    Args:
        r: rank, one for all sites, since they share A and B.
        seed: of A and B, which are drawn on the CPU so that every device gets the same.
        d_initial: what `d` starts at.
        dropout: probability of dropping an entry of A's input in training.
        save_projection: store A and B; without, they are drawn from the seed again at loading, which other versions
            of torch need not do alike.
        dtype: of all four; None is fp32 over a half-precision base and the base's own dtype otherwise. The product is
            computed in the base's dtype.

    Raises:
        ValueError: a rank below 1, a dropout outside [0, 1), a `d_initial` that is zero or no finite number, a seed that
            no generator takes.
    """

    r: int = 256
    seed: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0
    save_projection: bool = True
    dtype: torch.dtype | None = None

    default_targets = ("attention", "mlp")
    whole_keys = (_A, _B)

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs.check_settings(self.r, None, self.dropout)
        check_dtype(self.dtype)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed: an integer that fits 64 bits, as torch's generators take, not {self.seed!r}")
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise ValueError(f"d_initial: a finite number other than 0, not {self.d_initial!r}; with 0 b never learns")

    def refuses(self, site: Site) -> str | None:
        if (reason := why_no_host(site)) is not None:
            return reason
        return None if host_class(site) is LinearHost else "it is no Linear"

    def prepare(self, sites: Sequence[Site]) -> Projection:
        if isinstance(self.r, Mapping):
            raise ValueError(f"r={self.r!r}: all sites share one A and B, so there is one rank")
        hosts = [host_of(s) for s in sites]
        dtype = functools.reduce(torch.promote_types, [own_dtype(h.dtype, self.dtype) for h in hosts])
        return Projection(
            self.r, max(h.cols for h in hosts), max(h.rows for h in hosts), self.seed, hosts[0].device, dtype
        )

    def build(self, site: Site, plan: Projection) -> VeRAAdapter:
        host = host_of(site)
        if self.dropout and host.read:
            raise TargetError(
                f"dropout={self.dropout} cannot be applied at {site.name!r}: MultiheadAttention reads the weight, so "
                "there is no input to drop; set dropout=0.0 or exclude it"
            )
        return VeRAAdapter(host, plan, self)

    @classmethod
    def examples(cls) -> Sequence[VeRAConfig]:
        return (
            cls(r=4, targets="all-linear"),
            cls(r=3, seed=7, d_initial=0.3, dropout=0.25, save_projection=False, targets="all-linear"),
        )

    # -- the file -----------------------------------------------------------------------------------------------------

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("vera_lambda_b", "vera_lambda_d")

    def whole_tensors(self, adapters: Mapping[str, Any]) -> dict[str, Tensor]:
        shared = next(iter(adapters.values())).shared
        return {_A: shared.A.detach(), _B: shared.B.detach()} if self.save_projection else {}

    def load_whole(self, found: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> None:
        """Take over the stored A and B, which may be larger than these sites need, or draw them from the seed.

        Raises:
            ValueError: one of them is missing or too small.
        """
        shared: Projection = next(iter(adapters.values())).shared
        if not found and not self.save_projection:
            shared.draw(torch.device("cpu"))
            return
        for key, own, rank in ((_A, shared.A, 0), (_B, shared.B, 1)):
            if key not in found:
                raise ValueError(f"missing {key}, and the config says that it is stored")
            shape = found[key].shape
            if len(shape) != 2 or shape[rank] != own.shape[rank] or shape[1 - rank] < own.shape[1 - rank]:
                raise ValueError(
                    f"{key} has shape {tuple(shape)}, expected at least {tuple(own.shape)}, of rank {self.r}"
                )
        shared.hold(found[_A], found[_B])

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {
            "r": self.r,
            "projection_prng_key": self.seed,
            "save_projection": self.save_projection,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "fan_in_fan_out": any(getattr(a, "transposed", False) for a in adapters.values()),
            "bias": "none",
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
        }

    @classmethod
    def check_peft(cls, stored: Mapping[str, Any]) -> None:
        if stored.get("bias") not in (None, "none"):
            raise ValueError(f"bias={stored['bias']!r} is not supported by {cls.__name__}; expected 'none'")

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> VeRAConfig:
        return cls(
            targets=tuple(f"^{path}" for path in shapes),
            r=stored.get("r", 256),
            seed=stored.get("projection_prng_key") or 0,
            d_initial=float(stored.get("d_initial") or 0.1),
            dropout=float(stored.get("vera_dropout") or 0.0),
            save_projection=bool(stored.get("save_projection", True)),
        )


class Projection(nn.Module):
    """The frozen pair that all sites share. A: `(r in)`, B: `(out r)`, of the largest sites.

    One module that hangs on every adapter, so that copies, pickles and moves of the model keep it one.
    """

    A: nn.Parameter
    B: nn.Parameter
    seed: int
    stored: bool

    def __init__(self, r: int, cols: int, rows: int, seed: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        vars(self).update(seed=seed)
        for name, shape in (("A", (r, cols)), ("B", (rows, r))):
            values = torch.empty(shape, device=device, dtype=dtype)
            self._parameters[name] = nn.Parameter(values, requires_grad=False)
        self.stored = False
        self._drawn: tuple[int, ...] | None = None

    def hold(self, a: Tensor, b: Tensor) -> None:
        """Let these, from a file, be the pair, on the device where it lies."""
        for name, value in (("A", a), ("B", b)):
            own = getattr(self, name)
            place = value.device if own.is_meta else own.device
            self._parameters[name] = nn.Parameter(value.to(place), requires_grad=False)
        self.stored = True

    @torch.no_grad()
    def draw(self, device: torch.device) -> None:
        """Values from the seed, unless they are there or from a file; on `device` if they are on the meta device yet.

        Kaiming's uniform distribution with gain √2, as peft draws it: bounds ±√(6/in) for A and ±√(6/r) for B, in fp32.
        """
        target = device if self.A.is_meta else self.A.device
        if target.type == "meta" or self._drawn == self._state() or (self.stored and not self.A.is_meta):
            return
        g = torch.Generator().manual_seed(self.seed)
        made = []
        for own in (self.A, self.B):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(own.shape[1]))
            values = torch.empty(own.shape, dtype=torch.float32).uniform_(-bound, bound, generator=g)
            made.append(nn.Parameter(values.to(device=target, dtype=own.dtype), requires_grad=False))
        self.A, self.B = made
        self._drawn = self._state()

    def _state(self) -> tuple[int, ...]:
        """Changes with every change of the values: what has been drawn need not be drawn for each site again."""
        return id(self.A), self.A._version, id(self.B), self.B._version


class VeRAAdapter(WeightChange):
    """`d`: `(r)` and `b`: `(out)`; A and B are `shared`."""

    tensor_names = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    dropout: float
    d_initial: float
    transposed: bool
    shared: Projection
    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter

    def __init__(self, host: Host, shared: Projection, config: VeRAConfig):
        super().__init__(
            host,
            dropout=config.dropout,
            d_initial=config.d_initial,
            transposed=getattr(host, "transposed", False),
        )
        self._modules["shared"] = shared
        self.make({"vera_lambda_b": (host.rows,), "vera_lambda_d": (config.r,)}, own_dtype(host.dtype, config.dtype))

    def draw(self) -> None:
        self.shared.draw(self.place)
        self.vera_lambda_b.zero_()
        self.vera_lambda_d.fill_(self.d_initial)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The site's part of A: `(r in)` and B: `(out r)`."""
        place = self.vera_lambda_d.device
        return self.shared.A[:, : self.host.cols].to(place), self.shared.B[: self.host.rows].to(place)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The vectors multiply what flows through, not the matrices: no gradient has the size of A or B."""
        a, b = self.pair()
        p, dtype = self.dropout if self.training else 0.0, y.dtype
        x = x.to(device=a.device, dtype=dtype)
        h = F.linear(F.dropout(x, p) if p else x, a.to(dtype)) * self.vera_lambda_d.to(dtype)
        return y + (F.linear(h, b.to(dtype)) * self.vera_lambda_b.to(dtype)).to(y.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """As a plain pair: `diag(d) A` and `diag(b) B`."""
        a, b = self.pair()
        return self.vera_lambda_d[:, None] * a, self.vera_lambda_b[:, None] * b

    def change(self) -> Tensor:
        a, b = self.factors()
        return b @ a

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        self.host.add_pair_(target, *self.factors(), 1.0)

    def extra_repr(self) -> str:
        return f"r={self.vera_lambda_d.shape[0]}" + (f", dropout={self.dropout}" if self.dropout else "")
