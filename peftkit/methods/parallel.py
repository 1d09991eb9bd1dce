"""Parallel adapters: a bottleneck beside a sub-layer (He et al., arXiv 2110.04366).

`block(x) + s · PA(x)`, with x what the block itself takes (table 1 and section 4.2): in a pre-norm layer that is the
normed input. The paper's own code reads the residual stream before the norm there (mBART), and the block's input in
post-norm models.

BERT's sub-layers have no module with that output: residual and norm are inside. The branch then enters with the
residual: `norm(dense(h) + x)` becomes `norm(dense(h) + x + s · PA(x))`, which is the same function, and hangs on the
`output` module, which is given h and x.
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
class ParallelAdapterConfig(BottleneckConfig, method="parallel", peft_type="PARALLEL_ADAPTER"):
    """A bottleneck beside a sub-layer or a single Linear; without `targets` beside every feed-forward sub-layer.

    `he` and `llm_adapters` are the placements and settings of papers; what they are given wins.
    """

    def place(self, sub_layer: blocks.SubLayer) -> nn.Module | None:
        return sub_layer.block or sub_layer.joins

    def no_place(self, sub_layer: blocks.SubLayer) -> str:
        return (
            "is no module of its own there, so nothing can be put beside it; name single Linears with targets=, or use "
            "SeriesAdapterConfig"
        )

    def refuses(self, site: Site) -> str | None:
        if isinstance(site.module, nn.Embedding):
            return "it is an Embedding, which takes no vectors"
        return super().refuses(site)

    def sizes(self, module: nn.Module) -> blocks.Sizes | None:
        found = blocks.sizes(module)
        return (found[1], found[1]) if found is not None and blocks.joins_residual(module) else found

    def build(self, site: Site, plan: dict[str, Shape]) -> ParallelAdapter:
        return ParallelAdapter(site, plan[site.name], self)

    @classmethod
    def he(
        cls, *, targets: Targets = ("mlp",), bottleneck: Any = 512, scale: Any = 4.0, **kwargs: Any
    ) -> ParallelAdapterConfig:
        """The scaled parallel adapter beside the feed-forward: ReLU, s = 4, biases, dropout after ReLU (He et al., 4.6).

        b is 512, as in the paper's MAM adapter.
        """
        return cls(targets=targets, bottleneck=bottleneck, scale=scale, **kwargs)

    @classmethod
    def llm_adapters(
        cls,
        *,
        targets: Targets = ("up_proj", "down_proj"),
        bottleneck: Any = 256,
        activation: str = "tanh",
        bias: bool = False,
        init: str = "bert",
        **kwargs: Any,
    ) -> ParallelAdapterConfig:
        """As the code of LLM-Adapters (Hu et al., arXiv 2304.01933) with its published parameter count, 3.54 % of LLaMA-7B.

        Beside single Linears, where the paper's figure has it beside the block; tanh, no biases, no identity at first.
        """
        return cls(targets=targets, bottleneck=bottleneck, activation=activation, bias=bias, init=init, **kwargs)

    @classmethod
    def examples(cls) -> Sequence[ParallelAdapterConfig]:
        return (
            cls(bottleneck=3, targets="mlp"),
            cls.he(bottleneck=2, activation="gelu", targets=("attention", "mlp")),
            cls(bottleneck=3, activation="tanh", bias=False, scale="learned", dropout=0.25, targets="all-linear"),
            cls(bottleneck=2, activation="silu", init="bert", targets=("attention",)),
        )


class ParallelAdapter(BottleneckAdapter):
    """`base(x) + PA(x)`; on a module `(h, x) -> norm(… h + x)`, `base(h, x + PA(x))`.

    `arguments` are the names of what its host's forward takes.
    """

    gathers = 1

    def __init__(self, site: Site, shape: Shape, config: ParallelAdapterConfig):
        super().__init__(site, shape, config)
        self.joins = blocks.joins_residual(site.module)
        self.arguments = [p.name for p in blocks.arguments(site.module)]

    @classmethod
    def gathered(cls, adapters: Sequence[ParallelAdapter], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = adapters[0]
        at = 1 if first.joins else 0
        x = first._argument(at, args, kwargs)

        def change(y: Tensor) -> Tensor:
            for adapter in adapters:
                beside = adapter.of(x.to(y.dtype))
                if beside.shape != y.shape:
                    raise ValueError(
                        f"{first.name!r} takes {tuple(x.shape)} and gives {tuple(y.shape)}, and what is beside it "
                        f"gives {tuple(beside.shape)}; name a module that keeps all but the last dimension"
                    )
                y = y + beside.to(y)
            return y

        if not first.joins:
            return changed(base(*args, **kwargs), change, first.name)
        if len(args) > at:
            return base(*args[:at], change(x), *args[at + 1 :], **kwargs)
        return base(*args, **{**kwargs, first.arguments[at]: change(x)})

    def _argument(self, at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The argument of the host at this place, given by place or by name."""
        found = args[at] if len(args) > at else kwargs.get(self.arguments[at]) if len(self.arguments) > at else None
        if not isinstance(found, Tensor):
            raise TypeError(
                f"{self.name!r} was called without the tensor {self.arguments[at : at + 1]} that its adapter reads"
            )
        return found
