"""Adapters that change one weight, whatever method they belong to: where their parameters lie, the sum, the merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.hosts import Host
from peftkit.method import Adapter
from peftkit.sites import Site

_PARTS = ("q_proj", "k_proj", "v_proj")


class Drawn(Adapter):
    """An adapter whose parameters are made empty where its host is, and whose values are drawn later."""

    @property
    def place(self) -> torch.device:
        """Where its parameters belong."""
        raise NotImplementedError

    def draw(self) -> None:
        """Initial values, in place; called without gradients."""
        raise NotImplementedError

    def make(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        """An empty parameter of each name."""
        device = self.place
        for name, shape in shapes.items():
            self._parameters[name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Adapters made on the meta device are put where their host is by now, and have no values before."""
        device = self.place
        if device.type == "meta":
            return
        for name, p in self._parameters.items():
            if p is not None and p.is_meta:
                self._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        self.draw()


class HostAdapter(Drawn):
    """One that hangs on a host."""

    host: Host

    def __init__(self, host: Host, **attributes: Any):
        super().__init__()
        vars(self).update(host=host, **attributes)  # at once: nn.Module's __setattr__ is slow

    @property
    def place(self) -> torch.device:
        return self.host.device

    def why_not_merge(self) -> str | None:
        return self.host.why_not_merge()


class WeightChange(HostAdapter):
    """`y = op(x, W) + bias + op(x, ΔW)` for a ΔW that its parameters make; merged, `W + ΔW`.

    Its product is computed in the base's dtype; ΔW itself in the parameters' own.
    """

    def __init__(self, host: Host, **attributes: Any):
        merges = (host.weight_name,) if host.why_not_dense() is None else ()
        super().__init__(host, merges=merges, **attributes)

    def change(self) -> Tensor:
        """ΔW as one matrix `(groups·rows) cols` of the host's; a new tensor, differentiable."""
        raise NotImplementedError

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`y + op(x, ΔW)`; neither x nor y is changed."""
        weight = self._in_layout().to(y.dtype)
        return y + self.host.apply(x.to(device=weight.device, dtype=y.dtype), weight, None).to(y.device)

    def forward(self, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        y = base(*args, **kwargs)
        return self.add(given(args, kwargs), y)

    def delta(self, name: str) -> Tensor:
        return self._in_layout().to(self.host.weight.dtype)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        add_rounding_once_(target, self._in_layout())

    def _in_layout(self) -> Tensor:
        return self.host.from_matrices([self.change()])


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one input of a call, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_input(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with `x` for its input."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    return (), {**kwargs, next(iter(kwargs)): x}


def add_rounding_once_(target: Tensor, change: Tensor) -> None:
    """`target += change`, computed in the wider of both dtypes."""
    change = change.to(target.device)
    if torch.promote_types(target.dtype, change.dtype) == target.dtype:
        target.add_(change)
    else:
        target.copy_(change + target)


def bias_rows(site: Site) -> slice:
    """The rows of the site's bias parameter that are its own: the three projections of an `nn.MultiheadAttention`
    with separate weights share one bias.
    """
    if site.part not in _PARTS:
        return slice(None)
    size, at = int(site.module.embed_dim), _PARTS.index(site.part)  # type: ignore[arg-type]
    return slice(at * size, (at + 1) * size)
