"""(IA)³: learned vectors that scale keys, values and the inner activations of the MLP (Liu et al., arXiv 2205.05638).

`y = l ⊙ (W x + bias)` for the projections of keys and values (paper, eq. 1), `y = W (l ⊙ x) + bias` for the one that
leads out of the MLP (eq. 2). `l` starts at ones, so nothing changes at attach. Merged, `diag(l) W` and `l ⊙ bias`, or
`W diag(l)`.

Beside other adapters the vector scales what the base alone computes, and the others add: the weight is
`W + Σ (lᵢ − 1) W + Σ ΔW`, in whatever order they came, merged or not. So two vectors add their `l − 1`; elsewhere the
outer of two scales all that lies within, so that results depend on the order and two vectors multiply. With one
vector at a site there is no difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.dtypes import check_dtype, own_dtype
from peftkit.graft import graft_of, underneath
from peftkit.holder import without_merged
from peftkit.hosts import ConvHost, EmbeddingHost, LinearHost, host_class, host_of, why_no_host
from peftkit.method import Adapter, Config
from peftkit.sites import Site
from peftkit.targets import Pattern, Patterns, TargetError, heads, named_as, nearest
from peftkit.weight_change import (
    HostAdapter,
    bias_rows,
    given,
    with_input,
)

_PLACEMENT = "the projections of keys and values and the one out of the MLP"
_KEYS_AND_VALUES = re.compile(r"([kv]|key|value)(_?proj|_lin|_layer)?|k_proj|v_proj", re.IGNORECASE)
# several projections in one: the vector scales queries too, which as a product with the keys' adds nothing new
_FUSED = re.compile(r"c_attn|query_key_value|w?qkv(_proj)?|in_proj", re.IGNORECASE)
_DOWN = re.compile(r"down_proj|wo|w2|fc2|lin(ear_?)?2|c_proj|fc_out|(dense_)?4h_to_h|dense", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class IA3Config(Config, method="ia3", peft_type="IA3"):
    """(IA)³ (arXiv 2205.05638).

    Args:
        targets: None is what the paper scales: the outputs of the projections of keys and values (of a fused one all
            outputs) and the input of the one that leads out of the MLP.
        feedforward: which of the targets have the vector on their input, by pattern; None is those that lead out of
            an MLP by their names, an empty sequence none.
        dtype: of the vectors; None is fp32 over a half-precision base and the base's own dtype otherwise.

    Raises:
        ValueError: a dtype that is not floating-point. TargetError, at attaching: a pattern of `feedforward` that
            matches none of the adapted modules.
    """

    feedforward: Pattern | Sequence[Pattern] | None = None
    dtype: torch.dtype | None = None

    default_targets: ClassVar[Sequence[str]] = (_PLACEMENT,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtype(self.dtype)
        if self.feedforward is not None:
            one = isinstance(self.feedforward, str | re.Pattern)
            object.__setattr__(self, "feedforward", (self.feedforward,) if one else tuple(self.feedforward))  # type: ignore[arg-type]

    def refuses(self, site: Site) -> str | None:
        if (reason := why_no_host(site)) is not None:
            return reason
        return "it is an Embedding, whose rows no product makes" if host_class(site) is EmbeddingHost else None

    def presets(self, model: nn.Module, sites: Sequence[Site]) -> Callable[[str, Site], bool]:
        by_name, head_ids = super().presets(model, sites), heads(model)

        def in_preset(preset: str, site: Site) -> bool:
            if preset != _PLACEMENT:
                return by_name(preset, site)
            if host_class(site) is not LinearHost or id(site.module) in head_ids:
                return False
            last = site.name.rpartition(".")[2]
            scaled = _KEYS_AND_VALUES.fullmatch(last) or _FUSED.fullmatch(last)
            return leads_out(site) or (scaled is not None and named_as("attention", site))

        return in_preset

    def prepare(self, sites: Sequence[Site]) -> dict[str, bool]:
        """Whether the vector of each site is on its input."""
        if self.feedforward is None:
            return {s.name: leads_out(s) for s in sites}
        patterns, used, found = Patterns(self.feedforward), set(), {}  # type: ignore[arg-type]
        for site in sites:
            hits = [h for name in site.names for h in patterns.matching(name)]
            used.update(hits)
            found[site.name] = bool(hits)
        for pattern in patterns.patterns:
            if pattern not in used:
                near = nearest(pattern, found)
                raise TargetError(f"feedforward: {pattern!r} matches none of the adapted modules{near}")
        return found

    def build(self, site: Site, plan: Mapping[str, bool]) -> IA3Adapter:
        return IA3Adapter(site, plan[site.name], self.dtype)

    @classmethod
    def examples(cls) -> Sequence[IA3Config]:
        return (cls(), cls(targets="all-linear"), cls(targets="all-linear", feedforward="*"))

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("ia3_l",)

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        made = {path: a for path, a in adapters.items() if isinstance(a, IA3Adapter)}
        on_input = [re.escape(path) for path, a in made.items() if a.on_input]
        return {
            # as a list its entries would have to be among those of target_modules, and would mean ends of names
            "feedforward_modules": "|".join(on_input) or [],
            "fan_in_fan_out": any(getattr(a.host, "transposed", False) for a in made.values()),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> IA3Config:
        listed = stored.get("feedforward_modules")
        if listed is None:
            raise ValueError("feedforward_modules is missing, which says where the vectors belong")

        def on_input(path: str) -> bool:
            if isinstance(listed, str):
                return re.fullmatch(listed, path) is not None
            return any(path.endswith(end) for end in listed)

        return cls(
            targets=tuple(f"^{path}" for path in shapes),
            feedforward=tuple(f"^{path}" for path in shapes if on_input(path)),
        )


def leads_out(site: Site) -> bool:
    """Whether the site's names say that it is the projection that leads out of an MLP."""
    if any(name.endswith("ffn_output") for name in site.names):  # ALBERT's lies beside its MLP, not in one
        return True
    return named_as("mlp", site) and any(
        _DOWN.fullmatch(last := name.rpartition(".")[2]) and (last != "dense" or name.endswith("output.dense"))
        for name in site.names
    )


class IA3Adapter(HostAdapter):
    """One vector. `ia3_l`: `(out 1)`, or `(1 in)` on the input; of a convolution `(1 channels 1 …)`."""

    tensor_names = {"ia3_l": "ia3_l"}
    reads_base = True
    on_input: bool
    rows: slice
    ia3_l: nn.Parameter

    def __init__(self, site: Site, on_input: bool, dtype: torch.dtype | None):
        host = host_of(site)
        module, held = site.module, site.module._parameters
        merges = [host.weight_name] if host.why_not_dense() is None else []
        if merges and not on_input and held.get(host.bias_name) is not None:
            merges.append(host.bias_name)
        super().__init__(host, on_input=on_input, rows=bias_rows(site), merges=tuple(merges))
        if isinstance(host, ConvHost):
            size = int(module.in_channels if on_input else module.out_channels)  # type: ignore[arg-type]
            shape = (1, size, *(1 for _ in module.kernel_size))  # type: ignore[union-attr]
        else:
            shape = (1, host.cols) if on_input else (host.rows, 1)
        self.make({"ia3_l": shape}, own_dtype(host.dtype, dtype))

    def draw(self) -> None:
        self.ia3_l.fill_(1.0)

    # -- computing --------------------------------------------------------------------------------------------------

    def forward(self, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not self._alone():
            y = base(*args, **kwargs)
            return (y + self._added(given(args, kwargs))).to(y.dtype)
        if self.on_input:
            x = given(args, kwargs)
            args, kwargs = with_input(self._scaled(x, self.ia3_l), args, kwargs)
            return base(*args, **kwargs)
        return self._scaled(base(*args, **kwargs), self.ia3_l)

    def _alone(self) -> bool:
        """Whether nothing else acts on the host, in its weight or around it."""
        graft = graft_of(self.host.module)
        return graft is None or (not graft.merged and len(graft.acting(graft.switch.acting())) == 1)

    def _added(self, x: Tensor) -> Tensor:
        """What `l − 1` adds to what the host computes without any adapter."""
        change = self.ia3_l - 1
        if not self.on_input:
            return self._scaled(self._own(x), change)
        if not self.host.intact and not graft_of(self.host.module).merged:  # type: ignore[union-attr]
            return self._own(self._scaled(x, self.ia3_l)) - self._own(x)
        x = self._scaled(x, change)
        if self.host.why_not_dense() is None:
            return self.host.apply(x, self.host.base_weight, None)
        y, bias = self._own(x), self.host.module._parameters.get(self.host.bias_name)
        return y if bias is None else y - bias.to(y.dtype)

    def _own(self, x: Tensor) -> Tensor:
        module, host = self.host.module, self.host
        graft = graft_of(module)
        if graft is None or not graft.merged:
            return underneath(module)(x)
        return host.apply(x, host.base_weight, without_merged(module, host.bias_name))

    def _scaled(self, x: Tensor, vector: Tensor) -> Tensor:
        """The product with the vector, in the wider dtype of both, in that of `x`: in half precision numbers near 1
        are too far apart to train.
        """
        shape = vector.shape[1:] if isinstance(self.host, ConvHost) else (-1,)
        return (x * vector.reshape(shape).to(x.device)).to(x.dtype)

    # -- merging ----------------------------------------------------------------------------------------------------

    def delta(self, name: str) -> Tensor:
        base = without_merged(self.host.module, name)
        assert base is not None
        return self._change(name, base).to(base.dtype)

    def applied(self, name: str, weight: Tensor) -> Tensor:
        base = without_merged(self.host.module, name)
        assert base is not None
        return (weight + self._change(name, base)).to(weight.dtype)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        target.copy_(target + self._change(name, base))

    def _change(self, name: str, base: Tensor) -> Tensor:
        """`(l − 1)` times the host's parameter `name`, in the wider dtype of both."""
        change = (self.ia3_l - 1).flatten().to(base.device)
        if name == self.host.bias_name:
            own = base[self.rows] * change
            whole = torch.zeros_like(base, dtype=own.dtype)
            whole[self.rows] = own
            return whole
        host = self.host
        if self.on_input:
            factors = change.view(host.groups, 1, -1)
            factors = factors.repeat_interleave(host.cols // factors.shape[2], dim=2)
        else:
            factors = change.view(host.groups, -1, 1)
        return host.from_matrices([m * f for m, f in zip(host.matrices(base), factors, strict=True)])

    def extra_repr(self) -> str:
        return "on its input" if self.on_input else "on its output"
