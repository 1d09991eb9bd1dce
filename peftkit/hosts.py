"""Hosts: how a module computes with one weight, as methods need to know it.

Every host is a linear map: `y = op(x, W) + bias`. Seen as a matrix, W is `(out, in)`, for a convolution
`(out, in/groups·kernel)`. What a method needs of it: its sizes, the map of a low-rank pair, and adding such a pair,
or any matrix, to the weight where it lies. One class for each kind of operation; methods never look at module types.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.graft import underneath
from peftkit.holder import original_class
from peftkit.kernels.lora_linear import lora_delta
from peftkit.sites import Site

_CHUNK_BYTES = 1 << 18  # fp32 scratch for merging into a half-precision weight; stays in the cache
_HF_CONV1D = "transformers.pytorch_utils"


class ModuleRef:
    """A module that is not owned: no cycle keeps a dropped model alive. Follows deepcopy and pickling."""

    __slots__ = ("__weakref__", "_ref")

    def __init__(self, module: nn.Module):
        self._ref = weakref.ref(module)

    def __call__(self) -> nn.Module | None:
        return self._ref()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRef:
        module = self._ref()
        return ModuleRef(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleRef, (self._ref(),)


class Host(abc.ABC):
    """One weight of one module.

    Attributes:
        name: the site's.
        weight_name, bias_name: the parameters of the module it computes with.
        read: the weight is read by an `nn.MultiheadAttention`; the module, if it is one at all, is never called.
        rows, cols: the weight as a matrix, `(rows, cols)` per group.
        groups: 1, or a convolution's.
        intact: the module computes by its class's own, known forward with a plain dense weight, so that a method may
            compute the product itself; else it must call what is underneath and add to that.
    """

    rows: int
    cols: int
    groups: int = 1

    def __init__(self, site: Site):
        self._module = ModuleRef(site.module)
        self.name = site.name
        self.weight_name = site.weight_name
        self.bias_name = site.bias_name
        self.read = site.reader is not None
        self.intact = False

    @property
    def module(self) -> Any:
        return self._module()

    # -- what the module has ----------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.weight_name]
        assert weight is not None
        return weight

    @property
    def device(self) -> torch.device:
        """Where the host computes: its weight's device, or where accelerate's hook brings the weight for a forward."""
        hook = self.module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the host computes in."""
        dtype = self.weight.dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
        for holder in (self.module, getattr(self.weight, "quant_state", None)):
            for name in ("compute_dtype", "dtype"):
                found = getattr(holder, name, None)
                if isinstance(found, torch.dtype) and found.is_floating_point:
                    return found
        return torch.get_default_dtype()

    def why_not_dense(self) -> str | None:
        """Why the weight cannot be read or written as plain numbers; None where it can."""
        if self.module._parameters.get(self.weight_name) is None:
            return f"its {self.weight_name} is not a parameter any more but computed"
        weight = self.weight
        kind = type(weight)
        if kind not in (nn.Parameter, Tensor):
            return f"its weight is a {kind.__name__}"
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            return f"its weight is packed {weight.dtype}"
        return None

    # -- low-rank pairs ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of rank `r`, as the file format has them."""

    @abc.abstractmethod
    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        """`y + scale · B(A(drop(x)))`; neither x nor y is changed."""

    @abc.abstractmethod
    def matrices(self, weight: Tensor) -> list[Tensor]:
        """`weight` as views of shape `(rows, cols)`, one for each group."""

    def pair_matrices(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A and B as matrices `(r, cols)` and `(rows, r)`, one pair for each group."""
        return [(a, b)]

    def why_not_hold(self, a: Tensor) -> str | None:
        """Why no weight of the host's shape equals a pair with this A; None where one does."""
        return None

    def to_stored(self, a: Tensor) -> Tensor:
        """A as the file format has it."""
        return a

    def from_stored(self, a: Tensor) -> Tensor:
        """The inverse of `to_stored`."""
        return a

    def dense(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """`scale · BA` in the layout of the weight; differentiable."""
        pieces = [scale * (bm @ am) for am, bm in self.pair_matrices(a, b)]
        return self.from_matrices(pieces)

    def from_matrices(self, pieces: list[Tensor]) -> Tensor:
        """The inverse of `matrices`."""
        return torch.cat(pieces).reshape(self.weight.shape) if len(pieces) > 1 else pieces[0].reshape(self.weight.shape)

    @torch.no_grad()
    def add_pair_(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        """`weight += scale · BA` in place, rounded once; scratch of at most 256 KiB beside the operands."""
        for w, (am, bm) in zip(self.matrices(weight), self.pair_matrices(a, b), strict=True):
            am, bm = am.to(w.device), bm.to(w.device)
            if w.dtype == torch.promote_types(w.dtype, am.dtype):
                w.addmm_(bm.to(w.dtype), am.to(w.dtype), alpha=scale)
                continue
            rows = max(1, _CHUNK_BYTES // (4 * max(1, w.shape[1])))
            scratch = torch.empty(min(rows, w.shape[0]), w.shape[1], device=w.device, dtype=am.dtype)
            for part, b_part in zip(w.split(rows), bm.to(am.dtype).split(rows), strict=True):
                wide = scratch[: len(part)].copy_(part)
                part.copy_(wide.addmm_(b_part, am, alpha=scale))

    # -- what the module should compute -----------------------------------------------------------------------------

    @abc.abstractmethod
    def probe(self) -> Tensor:
        """A small input."""

    @abc.abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a module of this kind computes."""

    def why_not_merge(self) -> str | None:
        """Why adding to the weight would not add to the output; None where it would."""
        if (reason := self.why_not_dense()) is not None:
            return reason
        if self.weight.is_meta:
            offloaded = getattr(self.module, "_hf_hook", None) is not None
            return "accelerate has offloaded its weight" if offloaded else "its weight is on the meta device"
        if not self.read and not self.known_forward() and not self._computes_as_expected():
            kind = type(self.module).__name__
            return f"the forward of this {kind} does not compute with `weight` and `bias` alone"
        return None

    def known_forward(self) -> bool:
        """Whether a call computes by a forward that this file knows, neither overridden nor replaced."""
        if "forward" in self.module.__dict__:
            return False
        forward: Any = original_class(self.module).forward
        return forward in _KNOWN_FORWARDS or (
            forward.__qualname__ == "Conv1D.forward" and forward.__module__ == _HF_CONV1D
        )

    @torch.no_grad()
    def _computes_as_expected(self) -> bool:
        """Asks the module itself, on one small input: whether its own forward is that of its kind."""
        module, x = self.module, self.probe()
        bias = module._parameters.get(self.bias_name)
        try:
            found = underneath(module)(x)
            expected = self.apply(x, self.weight, bias)
            eps = torch.finfo(expected.dtype).eps
            return torch.allclose(found, expected, rtol=32 * eps, atol=32 * eps * float(expected.abs().max() + 1e-30))
        except Exception:  # whatever a foreign forward raises on a plain input, it is not the one we know
            return False


class LinearHost(Host):
    """`nn.Linear` and its kin; `(in, out)` weights of GPT-2's Conv1D are read through a transposed view."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.transposed = site.part is None and _is_hf_conv1d(site.module)
        shape, dense = self.weight.shape, self.why_not_dense() is None
        if dense and len(shape) == 2:
            self.cols, self.rows = tuple(shape) if self.transposed else tuple(reversed(shape))
        else:  # packed weights have no shape of their own
            self.cols, self.rows = self.module.in_features, self.module.out_features  # type: ignore[assignment]
        self.intact = dense and not self.read and self.known_forward()

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.cols), (self.rows, r)

    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        if x.device != a.device:
            x = x.to(a.device)
        if y.device != a.device:
            return y + lora_delta(x, torch.zeros_like(y, device=a.device), a, b, scale, dropout).to(y.device)
        return lora_delta(x, y, a, b, scale, dropout)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        return [weight.t() if self.transposed else weight]

    def from_matrices(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0].t() if self.transposed else pieces[0]

    def probe(self) -> Tensor:
        return torch.linspace(-1, 1, self.cols, device=self.weight.device, dtype=self.weight.dtype)[None]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.transposed else weight, bias)


class EmbeddingHost(Host):
    """`nn.Embedding`: a table `(V, d)`, which as a linear map of one-hot rows is the matrix `(d, V)`."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.cols, self.rows = self.weight.shape

    @property
    def embed_scale(self) -> float | Tensor:
        """Gemma-like embeddings multiply what they look up."""
        return getattr(self.module, "embed_scale", 1.0)

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.cols), (self.rows, r)

    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        m = self.module
        rows = F.embedding(x.to(a.device), a.t(), m.padding_idx, None, 2.0, m.scale_grad_by_freq)
        delta = F.linear(rows, b).to(device=y.device, dtype=y.dtype)
        return torch.add(y, delta if isinstance(self.embed_scale, float) and self.embed_scale == 1.0
                         else delta * self.embed_scale, alpha=scale)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        return [weight.t()]

    def from_matrices(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0].t()

    def probe(self) -> Tensor:
        return torch.arange(min(3, self.cols), device=self.weight.device)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight) * self.embed_scale


class ConvHost(Host):
    """`nn.Conv1d/2d/3d`. A is a convolution with the host's own kernel, stride, padding, dilation and groups; B is 1×1
    and grouped likewise, so that the pair is again one convolution and can be merged.

    In the file, as in peft, A is not grouped: `(r, in, *kernel)`, with zeros between the groups. One that peft has
    trained has no such zeros; it computes what it computes there, but no grouped weight can hold it.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        self.groups = self.module.groups
        self.rows = self.module.out_channels // self.groups
        self.cols = self.weight[0].numel()

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kernel = self.module.kernel_size
        if r % self.groups:
            raise ValueError(f"r={r} at {self.name!r} is no multiple of its {self.groups} groups")
        return (r, self.module.in_channels // self.groups, *kernel), (
            self.module.out_channels, r // self.groups, *(1 for _ in kernel)
        )

    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        x = x.to(device=a.device, dtype=y.dtype)
        s = self._conv(F.dropout(x, dropout) if dropout else x, a.to(x.dtype), self.module.in_channels // a.shape[1])
        ones = (1,) * len(self.module.kernel_size)
        delta = self._function()(s, b.to(x.dtype), None, ones, 0, ones, self.groups)
        return torch.add(y, delta.to(y.device), alpha=scale)

    def _function(self) -> Callable[..., Tensor]:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.module.kernel_size) - 1]

    def _conv(self, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        m, padding = self.module, self.module.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
        return self._function()(x, weight, bias, m.stride, padding, m.dilation, groups)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        return list(weight.reshape(self.groups, self.rows, self.cols))

    @torch.no_grad()
    def add_pair_(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        packed = weight.contiguous()  # channels_last has no view as a matrix
        super().add_pair_(packed, a, b, scale)
        if packed is not weight:
            weight.copy_(packed)

    def why_not_hold(self, a: Tensor) -> str | None:
        if a.shape[1] == self.module.in_channels // self.groups:
            return None
        return f"its A, as peft trains it, crosses the {self.groups} groups of the convolution, which its weight cannot"

    def to_stored(self, a: Tensor) -> Tensor:
        if self.groups == 1 or self.why_not_hold(a) is not None:
            return a
        r, wide, *kernel = a.shape
        full = a.new_zeros(self.groups, r // self.groups, self.groups, wide, *kernel)
        for g, part in enumerate(a.view(self.groups, r // self.groups, wide, *kernel)):
            full[g, :, g] = part
        return full.view(r, self.groups * wide, *kernel)

    def from_stored(self, a: Tensor) -> Tensor:
        if self.groups == 1:
            return a
        r, _, *kernel = a.shape
        full = a.view(self.groups, r // self.groups, self.groups, -1, *kernel)
        own = torch.cat([full[g, :, g] for g in range(self.groups)])
        return own if torch.equal(self.to_stored(own), a) else a

    def pair_matrices(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        per = b.shape[1]
        am = a.reshape(self.groups, per, self.cols)
        bm = b.reshape(self.groups, self.rows, per)
        return list(zip(am, bm, strict=True))

    def probe(self) -> Tensor:
        size = [self.module.in_channels] + [
            2 * d * (k - 1) + 1 for d, k in zip(self.module.dilation, self.module.kernel_size, strict=True)
        ]
        n = torch.Size(size).numel()
        return torch.linspace(-1, 1, n, device=self.weight.device, dtype=self.weight.dtype).view(1, *size)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv(x, weight, self.groups, bias)


def _is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, known by its make so that transformers is not imported."""
    return any(c.__qualname__ == "Conv1D" and c.__module__ == _HF_CONV1D for c in type(module).__mro__)


_KNOWN_FORWARDS: set[object] = {
    nn.Linear.forward, nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward
}


def host_class(site: Site) -> type[Host] | None:
    """The kind of host at `site`; None where nothing here knows how the module computes."""
    module = site.module
    if site.part is not None or isinstance(module, nn.Linear) or _is_hf_conv1d(module):
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
        return f"its {site.weight_name} is not a parameter but computed (weight_norm, spectral_norm or a parametrization)"
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


def linear_like(site: Site) -> bool:
    """Whether the presets count the site among the Linears."""
    return host_class(site) is LinearHost
