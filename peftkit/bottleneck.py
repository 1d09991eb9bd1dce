"""What bottleneck adapters share: down, a nonlinearity, up, beside something that is as wide.

`PA(x) = s · (W_up · drop(g(W_down · x + b_down)) + b_up)`, `W_down: (b in)`, `W_up: (out b)`: `b (in + out)` parameters, and
`b + out` with biases (Houlsby et al., arXiv 1902.00751, section 2; He et al., arXiv 2110.04366, table 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import blocks
from peftkit.bottleneck_config import ACTIVATIONS, KEYS, KEYS_OF_BIASES, KEYS_OF_SCALE, BottleneckConfig, Shape
from peftkit.dtypes import own_dtype
from peftkit.hosts import LinearHost, ModuleRef, host_class, host_of, why_no_host
from peftkit.method import Adapter
from peftkit.sites import Site


class BottleneckAdapter(Adapter):
    """One bottleneck. `down: (b in)`, `up: (out b)`, `down_bias: (b)`, `up_bias: (out)`; `scale` a number or `()`."""

    down: nn.Parameter
    up: nn.Parameter
    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    scale: float | nn.Parameter

    def __init__(self, site: Site, shape: Shape, config: BottleneckConfig):
        super().__init__()
        self.name, self.shape = site.name, shape
        self.activation, self.dropout, self.init = config.activation, config.dropout, config.init
        self.tensor_names = {**KEYS, **(KEYS_OF_BIASES if config.bias else {})}
        device, base = _where(site.module)
        dtype = own_dtype(base, config.dtype)

        def room(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.down, self.up = room(shape.bottleneck, shape.into), room(shape.out, shape.bottleneck)
        self.down_bias = room(shape.bottleneck) if config.bias else None
        self.up_bias = room(shape.out) if config.bias else None
        if config.scale == "learned":
            self.scale = room()
            self.tensor_names |= KEYS_OF_SCALE
        else:
            self.scale = float(config.scale)
        self.module = ModuleRef(site.module)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.gathered([self], base, *args, **kwargs)

    def of(self, x: Tensor) -> Tensor:
        """PA(x): `(… in)` -> `(… out)`, in the dtype of x.

        Raises:
            ValueError: x has another last dimension.
        """
        if x.shape[-1] != self.shape.into:
            raise ValueError(
                f"the adapter at {self.name!r} was made for a last dimension of {self.shape.into}, not for "
                f"{tuple(x.shape)}; give its size= where attaching"
            )
        x = x.to(self.down.device).contiguous()  # else torch's product depends, in its last bits, on what is trained
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        down_bias, up_bias = (None if p is None else p.to(x.dtype) for p in (self.down_bias, self.up_bias))
        hidden = ACTIVATIONS[self.activation](F.linear(x, down, down_bias))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        if isinstance(self.scale, Tensor) or self.scale != 1.0:  # of the small factor, see pytorch#167313
            hidden = hidden * self.scale
            up_bias = up_bias * self.scale if up_bias is not None else None
        return F.linear(hidden, up, up_bias)

    def why_not_merge(self) -> str:
        if self.activation == "identity":
            return "it has no nonlinearity, but merging it is not provided for; LoRA is the form that merges"
        return f"a nonlinearity ({self.activation}) lies between its two matrices, so no weight can hold them"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `init` says. Adapters made on the meta device are put where their site is."""
        module = self.module()
        device = _where(module)[0] if module is not None else self.down.device
        if self.down.is_meta and device.type != "meta":
            for name, p in self._parameters.items():
                if p is not None:
                    self._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        if self.init == "bert":
            self.down.normal_(std=0.02)
            self.up.normal_(std=0.02)
        else:
            bound = 1 / math.sqrt(self.shape.into)
            self.down.uniform_(-bound, bound)
            self.up.zero_()
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                bias.zero_()
        if isinstance(self.scale, nn.Parameter):
            self.scale.fill_(1.0)

    def extra_repr(self) -> str:
        learned = isinstance(self.scale, Tensor)
        scale = "" if not learned and self.scale == 1.0 else f", scale={'learned' if learned else f'{self.scale:g}'}"
        return f"b={self.shape.bottleneck}, {self.activation}{scale}" + (
            f", dropout={self.dropout}" if self.dropout else ""
        )


def changed(output: Any, change: Callable[[Tensor], Tensor], name: str) -> Any:
    """`output` with `change` applied to it, or to the first of several.

    Raises:
        TypeError: it is neither a tensor nor begins with one.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        items = (change(output[0]), *output[1:])
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)  # type: ignore[call-arg]
    raise TypeError(
        f"{name!r} returns a {type(output).__name__}, and the adapter there needs a tensor, or a tuple that begins with "
        "one; name a module inside it"
    )


def _where(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a block computes, and in which dtype: by a Linear in it, else by any tensor of it."""
    own = [m for _, m in blocks.everything_in(module)]
    for site in (Site("", m) for m in own):
        if host_class(site) is LinearHost and why_no_host(site) is None:
            host = host_of(site)
            return host.device, host.dtype
    held = [t for m in own for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    for t in held:
        if t.is_floating_point() and t.dtype.itemsize > 1:
            return t.device, t.dtype
    return held[0].device if held else torch.get_default_device(), torch.get_default_dtype()
