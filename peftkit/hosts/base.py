"""What every host has: its weight, and what methods ask of it."""

from __future__ import annotations

import abc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.graft import underneath
from peftkit.holder import original_class, without_merged
from peftkit.sites import Site

_CHUNK_BYTES = 1 << 18  # fp32 scratch for merging into a half-precision weight; stays in the cache
_HF_CONV1D = "transformers.pytorch_utils"  # where its Conv1D is, known by name so that transformers is not imported
_KNOWN_FORWARDS: set[object] = {
    nn.Linear.forward,
    nn.Embedding.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
}


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
        feature_axis: of the output, from the end: where the rows of the weight are.
        intact: the module computes by its class's own, known forward with a plain dense weight, so that a method may
            compute the product itself; else it must call what is underneath and add to that.
    """

    rows: int
    cols: int
    groups: int = 1
    feature_axis: int = -1  # of what the module computes

    def __init__(self, site: Site):
        self._module = ModuleRef(site.module)
        self.name = site.name
        self.weight_name = site.weight_name
        self.bias_name = site.bias_name
        self.read = site.reader is not None
        self.intact = False

    @property
    def module(self) -> Any:
        return self._module._ref()

    # -- what the module has ----------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.weight_name]
        assert weight is not None
        return weight

    @property
    def base_weight(self) -> Tensor:
        """The weight without the adapters that may be merged into it."""
        weight = without_merged(self.module, self.weight_name)
        assert weight is not None
        return weight

    @property
    def device(self) -> torch.device:
        """Where the host computes: its weight's device, or where accelerate's hook brings the weight for a forward."""
        hook = self.module.__dict__.get("_hf_hook")
        if hook is None:
            return self.weight.device
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
        return self.weight.device

    @property
    def offloaded(self) -> bool:
        """Whether accelerate holds the weight elsewhere between forwards."""
        return self.weight.is_meta and getattr(self.module, "_hf_hook", None) is not None

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
        weight = self.module._parameters.get(self.weight_name)
        if weight is None:
            return f"its {self.weight_name} is not a parameter any more but computed"
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

    def as_matrices(self, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W: (rows cols), A: (r cols) and B: (rows r); with groups in front where there are several."""
        return self.matrices(weight)[0], a, b

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
            dtype = torch.promote_types(w.dtype, am.dtype)
            if w.dtype is dtype:
                w.addmm_(bm.to(w.dtype), am.to(w.dtype), alpha=scale)
                continue
            rows = max(1, _CHUNK_BYTES // (dtype.itemsize * max(1, w.shape[1])))
            scratch = torch.empty(min(rows, w.shape[0]), w.shape[1], device=w.device, dtype=dtype)
            am = am.to(dtype)
            for part, b_part in zip(w.split(rows), bm.to(dtype).split(rows), strict=True):
                wide = scratch[: len(part)].copy_(part)
                part.copy_(wide.addmm_(b_part, am, alpha=scale))

    @torch.no_grad()
    def rescale_(self, weight: Tensor, base: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor) -> None:
        """`weight += (gain − 1) ∘ base + gain ∘ scale · BA` in place, rounded once; scratch as for `add_pair_`.

        gain: one number a row of all groups together; base: None where it is what `weight` holds.
        """
        gains, dtype = gain.view(self.groups, -1, 1), torch.promote_types(weight.dtype, gain.dtype)
        bases = self.matrices(weight if base is None else base)
        for w, w0, (am, bm), g in zip(self.matrices(weight), bases, self.pair_matrices(a, b), gains, strict=True):
            left, right, by = bm.to(dtype) * (g * scale), am.to(dtype), (g if base is None else g - 1).to(dtype)
            if w.stride(0) < w.stride(1):  # a transposed view: row by row as it lies in memory
                w, w0, left, right, by = w.t(), w0.t(), right.t(), left.t(), by.t()
            if base is None and w.dtype is dtype:
                w.mul_(by).addmm_(left, right)
                continue
            rows = max(1, _CHUNK_BYTES // (dtype.itemsize * max(1, w.shape[1])))
            scratch = torch.empty(min(rows, len(w)), w.shape[1], device=w.device, dtype=dtype)
            parts = zip(w.split(rows), w0.split(rows), left.split(rows), by.expand(len(w), -1).split(rows), strict=True)
            for part, part0, left_part, g_part in parts:
                # widened first: a product of two dtypes is several times slower
                wide = scratch[: len(part)].copy_(part0).mul_(g_part).addmm_(left_part, right)
                part.copy_(wide if base is None else wide.add_(part))

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
            return "accelerate has offloaded its weight" if self.offloaded else "its weight is on the meta device"
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


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear with an `(in, out)` weight."""
    return any(c.__qualname__ == "Conv1D" and c.__module__ == _HF_CONV1D for c in type(module).__mro__)
