"""BitFit: the biases alone are trained (Ben Zaken et al., arXiv 2106.10199).

A bias becomes `bias + δ` with a trained δ that starts at zero; the base keeps its bits, and δ can be taken off, switched,
stored and merged like any other adapter. The paper trains the output head beside the biases: name it in `also_train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm

from peftkit.dtypes import check_dtype, own_dtype
from peftkit.holder import original_class
from peftkit.hosts import Host, ModuleRef, host_of, is_hf_conv1d, why_no_host
from peftkit.method import Adapter, Config
from peftkit.sites import Site
from peftkit.targets import Patterns, TargetError
from peftkit.weight_change import Drawn, add_rounding_once_, bias_rows

_EVERY = "every bias"
_LAST = (nn.Linear, nn.LayerNorm, nn.Bilinear)  # the bias is along the last dimensions of the output
_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(Config, method="bitfit"):
    """BitFit (arXiv 2106.10199).

    Args:
        targets: modules that have a bias; None is every bias of the model but those of modules that `also_train`
            trains whole. A module that is no Linear, convolution, LayerNorm, GroupNorm, BatchNorm, InstanceNorm,
            Bilinear or MultiheadAttention is left out, since what it does with its bias is not known.
        dtype: of δ; None is fp32 over a half-precision base and the base's own dtype otherwise.

    Raises:
        ValueError: a dtype that is not floating-point. TargetError, at attaching: the model has no bias.
    """

    dtype: torch.dtype | None = None

    default_targets: ClassVar[Sequence[str]] = (_EVERY,)
    peft_reads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtype(self.dtype)

    def refuses(self, site: Site) -> str | None:
        bias, kind = site.module._parameters.get(site.bias_name), original_class(site.module).__name__
        if bias is None:
            return f"it is a {kind} without a bias"
        if isinstance(bias, nn.UninitializedParameter):
            return f"this {kind} has no shape yet; run one batch through the model first"
        if site.part is None and _dimensions_behind(site.module, 3) is None:
            return f"it is a {kind}, and what that does with its bias is not known"
        return None

    def presets(self, model: nn.Module, sites: Sequence[Site]) -> Callable[[str, Site], bool]:
        if all(self.refuses(site) is not None for site in sites):
            raise TargetError(
                f"{type(model).__name__} matches no module that BitFit can adapt: it has no biases, as LLaMA has none, so "
                "there is nothing to train; use another method"
            )
        by_name, whole = super().presets(model, sites), Patterns(self.also_train)

        def in_preset(preset: str, site: Site) -> bool:
            return not any(map(_within(whole), site.names)) if preset == _EVERY else by_name(preset, site)

        return in_preset

    def build(self, site: Site, plan: None) -> BitFitAdapter:
        return BitFitAdapter(site, self.dtype)

    @classmethod
    def examples(cls) -> Sequence[BitFitConfig]:
        return (cls(), cls(targets="all-linear"))

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ("bitfit_bias",)

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {}  # peft has no such method

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> BitFitConfig:
        return cls(targets=tuple(f"^{path}" for path in shapes))


def _within(patterns: Patterns) -> Callable[[str], bool]:
    """Whether a name, or that of a module it lies in, matches."""

    def matches(name: str) -> bool:
        while name:
            if patterns.matching(name):
                return True
            name = name.rpartition(".")[0]
        return False

    return matches


def _dimensions_behind(module: nn.Module, dim: int) -> int | None:
    """How many dimensions of a `dim`-dimensional output lie behind the one that the bias is along; None if unknown."""
    if isinstance(module, _LAST) or is_hf_conv1d(module):
        return 0
    if isinstance(module, conv._ConvNd):
        return len(module.kernel_size)
    if isinstance(module, instancenorm._InstanceNorm):
        return next(
            (n for end, n in _SPATIAL.items() if any(c.__name__.endswith(end) for c in type(module).__mro__)), None
        )
    if isinstance(module, batchnorm._BatchNorm | nn.GroupNorm):
        return dim - 2
    return None


class BitFitAdapter(Drawn):
    """One δ, of the bias's shape; of an `nn.MultiheadAttention` with separate weights, of a projection's part of it.

    It is added to the output. A subclass that does more after adding its bias gets δ behind that, and cannot be merged.
    """

    tensor_names = {"delta_bias": "bitfit_bias"}
    ref: ModuleRef
    bias_name: str
    rows: slice
    host: Host | None
    delta_bias: nn.Parameter

    def __init__(self, site: Site, dtype: torch.dtype | None):
        super().__init__()
        rows = bias_rows(site)
        vars(self).update(
            ref=ModuleRef(site.module),
            host=host_of(site) if why_no_host(site) is None else None,
            bias_name=site.bias_name,
            rows=rows,
            merges=(site.bias_name,),
        )
        bias = self._bias()
        self.make({"delta_bias": tuple(bias[rows].shape)}, own_dtype(bias.dtype, dtype))

    def _bias(self) -> Tensor:
        bias = self.ref()._parameters[self.bias_name]  # type: ignore[union-attr]
        assert bias is not None
        return bias

    @property
    def place(self) -> torch.device:
        return self.host.device if self.host is not None else self._bias().device

    def draw(self) -> None:
        self.delta_bias.zero_()

    def forward(self, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        y, module = base(*args, **kwargs), self.ref()
        behind = _dimensions_behind(module, y.dim())  # type: ignore[arg-type]
        delta = self.delta_bias.to(y.device)
        return (y + delta.reshape(*delta.shape, *(1 for _ in range(behind or 0)))).to(y.dtype)

    def why_not_merge(self) -> str | None:
        if self.host is not None:
            return self.host.why_not_merge()
        module = self.ref()
        assert module is not None
        if self._bias().is_meta:
            return "its bias is on the meta device"
        if "forward" in module.__dict__ or original_class(module).forward not in _FORWARDS:
            return f"the forward of this {type(module).__name__} may not compute with `weight` and `bias` alone"
        return None

    def delta(self, name: str) -> Tensor:
        return self._whole().to(self._bias().dtype)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        add_rounding_once_(target, self._whole())

    def _whole(self) -> Tensor:
        """δ in the shape of the parameter, zero where other adapters change it."""
        bias = self._bias()
        if self.delta_bias.shape == bias.shape:
            return self.delta_bias
        whole = torch.zeros_like(bias, dtype=self.delta_bias.dtype)
        whole[self.rows] = self.delta_bias
        return whole


_FORWARDS: set[object] = {
    nn.LayerNorm.forward,
    nn.GroupNorm.forward,
    nn.Bilinear.forward,
    batchnorm._BatchNorm.forward,
    instancenorm._InstanceNorm.forward,
    nn.ConvTranspose1d.forward,
    nn.ConvTranspose2d.forward,
    nn.ConvTranspose3d.forward,
}
