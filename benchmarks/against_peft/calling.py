"""What an adapted module costs when it is called and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftkit

from .common import Row, Size, against, ours, theirs, timed, train_steps


def measure(size: Size) -> Iterator[Row]:
    """Time of a call, of a backward pass and of a train step."""
    inner = 50 if size.promised else 2
    with torch.no_grad():
        times = _times(_linears(64), lambda m, x: m(x), size, inner)
    yield Row(
        "one token through Linear 64→64, r 8, fp32",
        times["peftkit"] / times["frozen"],
        "× frozen",
        size.limit(2.1),
        times,
    )
    for width in (64, 1024):
        times = _times(_linears(width), lambda m, x: m(x).sum().backward(), size, min(inner, 10))
        yield against(f"forward and backward of one token, Linear {width}→{width}, r 8", times, size.limit(1.0))
    for dtype, limit in ((torch.float32, 1.12), (torch.bfloat16, 1.25)):
        for tokens in (size.tokens, 4 * size.tokens):
            times = train_steps(size, dtype, tokens, ours(), theirs())
            name = str(dtype).removeprefix("torch.")
            yield Row(
                f"train step of a 4-layer, {size.width}-wide Llama, {tokens} tokens, {name}",
                times["peftkit"] / times["frozen"],
                "× frozen",
                size.limit(limit),
                times,
            )


def _linears(width: int) -> dict[str, nn.Module]:
    """The same Linear frozen, grafted and wrapped, each as the only child of a model."""
    made = {
        name: nn.Sequential(nn.Linear(width, width)).requires_grad_(False) for name in ("frozen", "peftkit", "peft")
    }
    peftkit.inject(made["peftkit"], peftkit.LoRAConfig(r=8, alpha=16, targets="0"))
    peft.get_peft_model(made["peft"], peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    return {name: model[0] for name, model in made.items()}


def _times(
    modules: dict[str, nn.Module], call: Callable[[nn.Module, Tensor], Any], size: Size, inner: int
) -> dict[str, float]:
    x = torch.randn(1, next(iter(modules.values())).in_features, requires_grad=True)

    def calling(module: nn.Module) -> Callable[[], Any]:
        return lambda: call(module, x)

    candidates = {name: calling(module) for name, module in modules.items()}
    return timed(candidates, 40 * size.rounds, inner=inner, warmup=10)
