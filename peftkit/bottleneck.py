"""What bottleneck adapters share: down, a nonlinearity, up, beside something that is as wide.

`PA(x) = s · (W_up · drop(g(W_down · x + b_down)) + b_up)`, `W_down: (b in)`, `W_up: (out b)`: `b (in + out)` parameters, and
`b + out` with biases (Houlsby et al., arXiv 1902.00751, section 2; He et al., arXiv 2110.04366, table 1).
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import blocks
from peftkit.holder import CHILD, Graft
from peftkit.hosts import ModuleRef, host_of, linears_in
from peftkit.method import Adapter, Config
from peftkit.peft_patterns import compact
from peftkit.sites import Site
from peftkit.targets import PerSite, TargetError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}
INITS = ("kaiming", "bert")
Size = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(Config):
    """The settings of a bottleneck adapter.

    Args:
        bottleneck: width b of the bottleneck, or widths by pattern; None is 64, or what `reduction` makes it.
        reduction: instead of `bottleneck`, `b = out // reduction`; by pattern as well.
        activation: g, one of `ACTIVATIONS`; "swish" is "silu", "gelu" the exact one.
        bias: whether down and up have biases.
        scale: s, a number, or `"learned"`: one number for each site, which starts at 1.
        dropout: probability of dropping an entry of what g gives, in training.
        init: `"kaiming"`: W_down uniform in ±1/√in and W_up zero, so that nothing changes at first. `"bert"`: both from
            N(0, 0.02²), which does change the model. Biases are zero.
        dtype: of the parameters; None is fp32 over a half-precision base and the base's own dtype otherwise. The
            computation is in the base's dtype.
        size: the last dimension of what a target takes and gives, one number or `(in, out)`, where the target's structure
            does not tell it; by pattern as well.

    Raises:
        ValueError: a width below 1, both or unusable settings of it, an unknown activation or init, a scale that is zero
            or no finite number, a dropout outside [0, 1).
    """

    bottleneck: int | Mapping[str, int] | None = None
    reduction: int | Mapping[str, int] | None = None
    activation: str = "relu"
    bias: bool = True
    scale: float | Literal["learned"] = 1.0
    dropout: float = 0.0
    init: str = "kaiming"
    dtype: torch.dtype | None = None
    size: Size | Mapping[str, Size] | None = None

    default_targets: ClassVar[Sequence[str]] = ("mlp",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bottleneck", "reduction", "size"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(value))
        _check_settings(self)

    @property
    def identity(self) -> Literal["bits", "none"]:
        return "none" if self.init == "bert" else "bits"

    # -- where ------------------------------------------------------------------------------------------------------

    def place(self, sub_layer: blocks.SubLayer) -> nn.Module | None:
        """The module to hang on for a whole sub-layer; None where there is none."""
        raise NotImplementedError

    def no_place(self, sub_layer: blocks.SubLayer) -> str:
        """What to say where there is none, behind the sub-layer's name and "but it "."""
        raise NotImplementedError

    def presets(self, model: nn.Module, sites: Sequence[Site]) -> Callable[[str, Site], bool]:
        """Whole sub-layers for "attention" and "mlp"; "all-linear" is every single Linear, as elsewhere."""
        linear = linears_in(model)

        @functools.cache
        def places(preset: str) -> frozenset[int]:
            found = [(s, self.place(s)) for s in blocks.find(model) if s.kind == preset]
            for sub_layer, module in found:
                if module is None:
                    what = "attention" if preset == "attention" else "feed-forward"
                    raise TargetError(
                        f"{preset!r} means the {what} of {sub_layer.name!r}, but it {self.no_place(sub_layer)}"
                    )
            return frozenset(id(module) for _, module in found)

        def in_preset(preset: str, site: Site) -> bool:
            if preset == "all-linear":
                return linear(preset, site)
            return site.part is None and id(site.module) in places(preset)

        return in_preset

    def refuses(self, site: Site) -> str | None:
        if site.part is not None or site.reader is not None:
            return "a MultiheadAttention reads the weight there and calls no module; name the MultiheadAttention itself"
        if (reason := blocks.why_no_block(site.module)) is not None:
            return reason
        if self.size is None and self.sizes(site.module) is None:
            return (
                "it has no Linear or norm to tell the size of what it computes; name a module that has, or give "
                f"size={{{site.name!r}: …}}"
            )
        return None

    def sizes(self, module: nn.Module) -> blocks.Sizes | None:
        """In and out of the adapter at `module`, by its structure."""
        return blocks.sizes(module)

    # -- attaching --------------------------------------------------------------------------------------------------

    def prepare(self, sites: Sequence[Site]) -> dict[str, Shape]:
        width, reduction = PerSite(self.bottleneck, "bottleneck"), PerSite(self.reduction, "reduction")
        given = PerSite({**self.size, "**": None} if isinstance(self.size, Mapping) else self.size, "size")
        plan = {}
        for site in sites:
            size = given.at(site)
            size = (size, size) if isinstance(size, int) else size or self.sizes(site.module)
            if size is None:
                raise TargetError(f"size has no value for {site.name!r}, and its structure does not tell it")
            divisor = reduction.at(site)
            b = max(1, size[1] // divisor) if divisor is not None else width.at(site) or 64
            plan[site.name] = Shape(*size, b)
        names = [s.name for s in sites]
        for values in (width, reduction, given):
            values.finish(names)
        return plan

    def check(self, site: Site, plan: dict[str, Shape]) -> None:
        """Refuse a width that makes no sense.

        Raises:
            ValueError: a bottleneck wider than all that it lies between.
        """
        shape = plan[site.name]
        widest = max(shape.into, shape.out)
        if shape.bottleneck > widest:
            raise ValueError(
                f"bottleneck={shape.bottleneck} at {site.name!r} is wider than the {widest} that go in or come out "
                f"there, so it is none; lower it, as in bottleneck={{'**': {shape.bottleneck}, {site.name!r}: {widest}}}"
            )

    # -- the file ---------------------------------------------------------------------------------------------------

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return (*_NAMES.values(), *_BIAS_NAMES.values(), *_SCALE_NAME.values())

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "bias": self.bias,
            "dropout": self.dropout,
            "init": self.init,
            "scale": self.scale,
        }

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> BottleneckConfig:
        down = {path: found["adapter_down.weight"] for path, found in shapes.items()}
        return cls(
            bottleneck=compact({path: shape[0] for path, shape in down.items()}),
            size=compact({path: (shape[1], shapes[path]["adapter_up.weight"][0]) for path, shape in down.items()}),
            targets=tuple(f"^{path}" for path in shapes),
            **{key: stored[key] for key in ("activation", "bias", "dropout", "init", "scale")},
        )


@dataclass(frozen=True)
class Shape:
    """Sizes at one site."""

    into: int
    out: int
    bottleneck: int


_NAMES = {"down": "adapter_down.weight", "up": "adapter_up.weight"}
_BIAS_NAMES = {"down_bias": "adapter_down.bias", "up_bias": "adapter_up.bias"}
_SCALE_NAME = {"scale": "adapter_scale"}


class BottleneckAdapter(Adapter):
    """One bottleneck. `down: (b in)`, `up: (out b)`, `down_bias: (b)`, `up_bias: (out)`; `scale` a number or `()`."""

    gathers = True
    down: nn.Parameter
    up: nn.Parameter
    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    scale: float | nn.Parameter

    def __init__(self, site: Site, shape: Shape, config: BottleneckConfig):
        super().__init__()
        self.name, self.shape = site.name, shape
        self.activation, self.dropout, self.init = config.activation, config.dropout, config.init
        self.tensor_names = {**_NAMES, **(_BIAS_NAMES if config.bias else {})}
        device, base = _where(site.module)
        dtype = config.dtype or (base if base.itemsize >= 4 else torch.float32)

        def room(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.down, self.up = room(shape.bottleneck, shape.into), room(shape.out, shape.bottleneck)
        self.down_bias = room(shape.bottleneck) if config.bias else None
        self.up_bias = room(shape.out) if config.bias else None
        if config.scale == "learned":
            self.scale = room()
            self.tensor_names |= _SCALE_NAME
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
        down, up, down_bias, up_bias = (
            None if p is None else p.to(x.dtype) for p in (self.down, self.up, self.down_bias, self.up_bias)
        )
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
    """Where a block computes, and in which dtype, by a Linear in it, else by any of its parameters."""
    for inner in (m for m in module.modules() if type(m) is not Graft):
        if blocks.linear_sizes(inner) is not None and inner._parameters.get("weight") is not None:
            host = host_of(Site("", inner))
            return host.device, host.dtype
    for p in (p for n, p in module.named_parameters() if CHILD not in n.split(".")):
        if p.is_floating_point() and p.dtype.itemsize > 1:
            return p.device, p.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def _check_settings(config: BottleneckConfig) -> None:
    for name in ("bottleneck", "reduction"):
        value = getattr(config, name)
        for n in value.values() if isinstance(value, Mapping) else () if value is None else (value,):
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(f"{name}: an integer of at least 1, not {n!r}")
    if config.bottleneck is not None and config.reduction is not None:
        raise ValueError("bottleneck and reduction both say how wide the bottleneck is; give one of them")
    for size in (
        config.size.values() if isinstance(config.size, Mapping) else () if config.size is None else (config.size,)
    ):
        pair = (size, size) if isinstance(size, int) else size
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
            raise ValueError(f"size: a positive integer, or two, (in, out), not {size!r}")
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation: {config.activation!r} is unknown; {_near(config.activation, ACTIVATIONS)}")
    if config.init not in INITS:
        raise ValueError(f"init: {config.init!r} is unknown; {_near(config.init, INITS)}")
    s = config.scale
    if s != "learned" and (isinstance(s, bool | str) or not math.isfinite(s) or s == 0):
        raise ValueError(
            f"scale: a finite number other than 0, or 'learned', not {s!r}; with 0 or NaN nothing could be learned"
        )
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout: a probability in [0, 1), not {config.dropout!r}")
    if config.dtype is not None and not config.dtype.is_floating_point:
        raise ValueError(f"dtype: a floating-point dtype, not {config.dtype}")


def _near(wrong: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(wrong).lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(repr, known))}"
