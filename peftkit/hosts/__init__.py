"""Hosts: how a module computes with one weight, as methods need to know it.

Every host is a linear map: `y = op(x, W) + bias`. Seen as a matrix, W is `(out, in)`, for a convolution
`(out, in/groups·kernel)`. What a method needs of it: its sizes, the map of a low-rank pair, and adding such a pair,
or any matrix, to the weight where it lies. One class for each kind of operation; methods never look at module types.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftkit.holder import original_class
from peftkit.hosts.base import Host, ModuleRef, is_hf_conv1d
from peftkit.hosts.convolution import ConvHost
from peftkit.hosts.embedding import EmbeddingHost
from peftkit.hosts.linear import LinearHost
from peftkit.sites import Site
from peftkit.targets import heads, named_as

__all__ = [
    "ConvHost",
    "EmbeddingHost",
    "Host",
    "LinearHost",
    "ModuleRef",
    "host_class",
    "host_of",
    "is_hf_conv1d",
    "linears_in",
    "why_no_host",
]


def host_class(site: Site) -> type[Host] | None:
    """The kind of host at `site`; None where nothing here knows how the module computes."""
    module = site.module
    if site.part is not None or isinstance(module, nn.Linear) or is_hf_conv1d(module):
        return LinearHost
    if isinstance(module, nn.Embedding):
        return EmbeddingHost
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvHost
    return None


def why_no_host(site: Site) -> str | None:
    """Why no weight can be adapted at `site`; None where one can."""
    module = site.module
    kind = original_class(module).__name__
    cls = host_class(site)
    if cls is None:
        return f"it is a {kind}, not a Linear, Embedding, convolution or MultiheadAttention projection"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[arg-type]
        return f"this {kind} has no shape yet; run one batch through the model first"
    if module._parameters.get(site.weight_name) is None:
        return (
            f"its {site.weight_name} is not a parameter but computed (weight_norm, spectral_norm or a parametrization)"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an Embedding with max_norm rewrites its own weight in every forward"
    if module._parameters[site.weight_name].dim() < 2 and not hasattr(module, "in_features"):  # type: ignore[union-attr]
        return "its weight is not a matrix"
    return None


def host_of(site: Site) -> Host:
    """The host at `site`; `why_no_host` must have said None."""
    cls = host_class(site)
    assert cls is not None
    return cls(site)


def linears_in(model: nn.Module) -> Callable[[str, Site], bool]:
    """Whether a preset means a site of `model`: presets choose among what computes as a Linear, but for output heads."""
    head_ids = heads(model)

    def in_preset(preset: str, site: Site) -> bool:
        return host_class(site) is LinearHost and id(site.module) not in head_ids and named_as(preset, site)

    return in_preset
