"""The settings of bottleneck adapters, and where they hang; `peftkit.bottleneck` is what they compute."""

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
from peftkit.dtypes import check_dtype
from peftkit.hosts import linears_in
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
KEYS = {"down": "adapter_down.weight", "up": "adapter_up.weight"}
KEYS_OF_BIASES = {"down_bias": "adapter_down.bias", "up_bias": "adapter_up.bias"}
KEYS_OF_SCALE = {"scale": "adapter_scale"}
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

    peft_reads: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
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
        return (*KEYS.values(), *KEYS_OF_BIASES.values(), *KEYS_OF_SCALE.values())

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
    check_dtype(config.dtype)


def _near(wrong: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(wrong).lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(repr, known))}"
