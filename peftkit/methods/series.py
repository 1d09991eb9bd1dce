"""Series adapters: a bottleneck after a sub-layer, before its residual is added (Houlsby et al., arXiv 1902.00751).

`h ← h + s · (W_up g(W_down h + b_down) + b_up)`, with h what the sub-layer gives (figure 2). Several that act on one
module all read the same h and their changes add up; in a row, each would read what another has made of it and the order
would matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftkit import blocks
from peftkit.bottleneck import BottleneckAdapter, changed
from peftkit.bottleneck_config import BottleneckConfig, Shape
from peftkit.sites import Site
from peftkit.targets import Targets


@dataclass(frozen=True, kw_only=True)
class SeriesAdapterConfig(BottleneckConfig, method="series", peft_type="SERIES_ADAPTER"):
    """A bottleneck after a sub-layer's output, before the residual; without `targets` after every feed-forward one.

    `houlsby`, `pfeiffer` and `llm_adapters` are the placements and settings of papers; what they are given wins.
    """

    def place(self, sub_layer: blocks.SubLayer) -> nn.Module | None:
        return (sub_layer.exit if sub_layer.adds else None) or sub_layer.block or sub_layer.exit

    def no_place(self, sub_layer: blocks.SubLayer) -> str:
        return "ends in a norm, and no Linear gives its output before the residual; name a module to adapt"

    def sizes(self, module: nn.Module) -> blocks.Sizes | None:
        found = blocks.sizes(module)
        return (found[1], found[1]) if found is not None else None

    def build(self, site: Site, plan: dict[str, Shape]) -> SeriesAdapter:
        return SeriesAdapter(site, plan[site.name], self)

    @classmethod
    def houlsby(
        cls, *, targets: Targets = ("attention", "mlp"), activation: str = "gelu", **kwargs: Any
    ) -> SeriesAdapterConfig:
        """After attention and after the feed-forward, with GELU and biases; b is 64 (Houlsby et al., arXiv 1902.00751).

        The paper starts near zero, here W_up starts at zero. It also trains the norms: `also_train` does that.
        """
        return cls(targets=targets, activation=activation, **kwargs)

    @classmethod
    def pfeiffer(cls, *, targets: Targets = ("mlp",), reduction: int | None = 16, **kwargs: Any) -> SeriesAdapterConfig:
        """After the feed-forward alone, with ReLU and biases; b is the width by 16 (Pfeiffer et al., arXiv 2005.00247).

        It reads the sub-layer's output as it is. That the adapter should read it after the residual and the layer's own
        norm, as one of the arrangements searched there and the adapters library have it, is left out.
        """
        return cls(targets=targets, reduction=None if kwargs.get("bottleneck") else reduction, **kwargs)

    @classmethod
    def llm_adapters(
        cls,
        *,
        targets: Targets = ("mlp",),
        bottleneck: Any = 256,
        activation: str = "tanh",
        bias: bool = False,
        init: str = "bert",
        **kwargs: Any,
    ) -> SeriesAdapterConfig:
        """As the code of LLM-Adapters (Hu et al., arXiv 2304.01933) with its published parameter count, 0.99 % of LLaMA-7B.

        On what `down_proj` gives, which is what the feed-forward gives; tanh, no biases, and no identity at first. Its
        commands name other modules in places; the count fits this one.
        """
        return cls(targets=targets, bottleneck=bottleneck, activation=activation, bias=bias, init=init, **kwargs)

    @classmethod
    def examples(cls) -> Sequence[SeriesAdapterConfig]:
        return (
            cls(bottleneck=3, dropout=0.25, targets="mlp"),
            cls.houlsby(bottleneck=2, scale="learned", dropout=0.1),
            cls(bottleneck=3, activation="tanh", bias=False, scale=4.0, dropout=0.1, targets="all-linear"),
            cls(bottleneck=2, activation="silu", init="bert", targets=("attention",)),
        )


class SeriesAdapter(BottleneckAdapter):
    """`h + PA(h)`, for the h that its host and all other kinds of adapter there give."""

    gathers = 2

    @classmethod
    def gathered(cls, adapters: Sequence[SeriesAdapter], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def change(h: Tensor) -> Tensor:
            y = h
            for adapter in adapters:
                y = y + adapter.of(h).to(y)
            return y

        return changed(base(*args, **kwargs), change, adapters[0].name)
