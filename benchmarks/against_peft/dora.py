"""What DoRA costs beside peft's: to attach, to call, to train and to merge."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import nn

import peftkit

from .common import LINEARS, Row, Size, against, timed, train_steps


def measure(size: Size) -> Iterator[Row]:
    """Every figure that was promised."""
    linears, width = (168, 1024) if size.promised else (4, 32)
    times = _injecting(linears, width, size)
    yield against(f"inject DoRA into {linears} Linears of width {width}", times, size.limit(1 / 20))
    times = _one_token(width, size)
    name = f"one token through DoRA at Linear {width}→{width}, fp32, evaluated"
    yield Row(name, times["peftkit"] / times["frozen"], "× frozen", size.limit(1.3), times)
    for dropout, limit in ((0.0, 2.1), (0.1, 3.5)):
        tokens = 8 * size.tokens
        times = _one_linear(width, tokens, dropout, size)
        name = f"forward and backward of DoRA at Linear {width}→{width}, {tokens} tokens, bfloat16, p = {dropout}"
        yield Row(name, times["peftkit"] / times["frozen"], "× frozen", size.limit(limit), times)
    for dtype, dropout, limit in ((torch.bfloat16, 0.0, 1.45), (torch.bfloat16, 0.1, 1.6), (torch.float32, 0.0, 1.25)):
        times = train_steps(size, dtype, size.tokens, _ours(LINEARS, dropout), _theirs(list(LINEARS), dropout))
        kind = str(dtype).removeprefix("torch.")
        name = (
            f"train step with DoRA of a 4-layer, {size.width}-wide Llama, {size.tokens} tokens, {kind}, p = {dropout}"
        )
        yield Row(name, times["peftkit"] / times["frozen"], "× frozen", size.limit(limit), times)
    linears = 7 * size.merge_layers
    for dtype in (torch.float32, torch.bfloat16):
        times = _merging(linears, size.merge_width, dtype, size)
        name = f"merge DoRA at {linears} Linears of width {size.merge_width}, {str(dtype).removeprefix('torch.')}"
        yield against(f"{name}, and keep a copy of the base, which peft does not", times, size.limit(0.5))
        good = {"peftkit": times["peftkit for good"], "peft": times["peft"]}
        yield against(f"{name}, for good (keep_base=False)", good, size.limit(0.5))


def _ours(targets: Any, dropout: float = 0.0) -> peftkit.DoRAConfig:
    return peftkit.DoRAConfig(r=8, alpha=16, targets=targets, dropout=dropout)


def _theirs(targets: Any, dropout: float = 0.0) -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_dora=True, lora_dropout=dropout)


def _linears(count: int, width: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, dtype=dtype) for _ in range(count)))


def _injecting(count: int, width: int, size: Size) -> dict[str, float]:
    base, fresh = _linears(count, width), []

    def build() -> None:  # new modules around the same weights
        fresh[:] = [_linears(0, width).extend(_around(one) for one in base)]
        gc.collect()

    return timed(
        {
            "peftkit": lambda: peftkit.inject(fresh[0], _ours("all-linear")),
            "peft": lambda: peft.get_peft_model(fresh[0], _theirs(r"\d+")),
        },
        size.rounds,
        build,
        warmup=1,
    )


def _around(linear: nn.Module) -> nn.Linear:
    weight: Any = linear.weight
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(linear.bias.detach())  # type: ignore[union-attr, operator]
    return made


def _one_token(width: int, size: Size) -> dict[str, float]:
    models = {name: _linears(1, width).requires_grad_(False).eval() for name in ("frozen", "peftkit", "peft")}
    peftkit.inject(models["peftkit"], _ours("0"))
    peft.get_peft_model(models["peft"], _theirs(["0"])).eval()
    _draw(models["peftkit"]), _draw(models["peft"])
    x = torch.randn(1, width)

    def calling(module: nn.Module) -> Callable[[], Any]:
        return lambda: module(x)

    with torch.no_grad():
        return timed({n: calling(m[0]) for n, m in models.items()}, 6 * size.rounds, inner=10, warmup=3)


def _one_linear(width: int, tokens: int, dropout: float, size: Size) -> dict[str, float]:
    """Seconds of a step in which A and B have changed, so that the norm is computed."""
    dtype = torch.bfloat16
    models = {n: _linears(1, width, dtype).requires_grad_(False) for n in ("frozen", "peftkit", "peft")}
    peftkit.inject(models["peftkit"], _ours("0", dropout))
    peft.get_peft_model(models["peft"], _theirs(["0"], dropout))  # type: ignore[arg-type]
    x, dy = torch.randn(tokens, width, dtype=dtype, requires_grad=True), torch.randn(tokens, width, dtype=dtype)

    def stepping(module: nn.Module) -> Callable[[], Any]:
        trained = [p for p in module.parameters() if p.requires_grad]

        def step() -> None:
            torch.autograd.grad(module(x), (x, *trained), dy)
            with torch.no_grad():
                for p in trained:
                    p.add_(1e-6)

        return step

    return timed({n: stepping(m.train()) for n, m in models.items()}, size.rounds)


def _merging(count: int, width: int, dtype: torch.dtype, size: Size) -> dict[str, float]:
    ours, theirs = _linears(count, width, dtype), _linears(count, width, dtype)
    peftkit.inject(ours, _ours("all-linear"))
    wrapped = peft.get_peft_model(theirs, _theirs(r"\d+"))  # type: ignore[arg-type]
    _draw(ours), _draw(wrapped)
    first: Any = theirs[0]

    def apart() -> None:
        if not peftkit.adapters(ours):  # merged for good: the result is the base of the next round
            peftkit.inject(ours, _ours("all-linear"))
            _draw(ours)
        elif ours[0].peftkit.merged:  # type: ignore[union-attr]
            peftkit.unmerge(ours)
        if first.merged:
            wrapped.unmerge_adapter()  # type: ignore[operator]

    candidates = {
        "peftkit": lambda: peftkit.merge(ours),
        "peftkit for good": lambda: peftkit.merge(ours, keep_base=False),
        "peft": wrapped.merge_adapter,
    }
    return timed(candidates, size.rounds, apart, warmup=1)  # type: ignore[arg-type]


def _draw(model: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.normal_(std=0.02)
