"""What merging costs, in time and in memory, and whether it can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import peftkit

from .common import Row, Size, against, llama, names_of, ours, theirs, timed


def measure(size: Size) -> Iterator[Row]:
    """Time and memory of `merge`, and the weights that `unmerge` does not restore."""
    for dtype, limit in ((torch.float32, 0.6), (torch.bfloat16, 0.75)):
        yield from _merging(size, dtype, limit)


def _merging(size: Size, dtype: torch.dtype, limit: float) -> Iterator[Row]:
    name = str(dtype).removeprefix("torch.")
    linears = 7 * size.merge_layers
    ours_model = llama(size.merge_layers, size.merge_width, dtype=dtype)
    names = names_of(ours_model)
    peftkit.inject(ours_model, ours())
    wrapped = peft.get_peft_model(llama(size.merge_layers, size.merge_width, dtype=dtype), theirs())
    for model in (ours_model, wrapped):
        _draw(model)

    def apart() -> None:
        if not peftkit.adapters(ours_model):  # merged for good: the sum is the base of the next round
            peftkit.inject(ours_model, ours())
            _draw(ours_model)
        elif ours_model.get_submodule(names[0]).peftkit.merged:
            peftkit.unmerge(ours_model)
        if wrapped.get_submodule(f"base_model.model.{names[0]}").merged:
            wrapped.unmerge_adapter()

    times = timed(
        {
            "peftkit": lambda: peftkit.merge(ours_model),
            "peftkit for good": lambda: peftkit.merge(ours_model, keep_base=False),
            "peft": wrapped.merge_adapter,
            "copy": lambda: [ours_model.get_parameter(f"{n}.weight").detach().clone() for n in names],
        },
        size.rounds,
        apart,
        warmup=1,
    )
    apart()
    what = f"merge {linears} Linears of width {size.merge_width}, {name}"
    yield against(f"{what}, and keep a copy of the base, which peft does not", times, size.limit(limit))
    copying = {"peftkit": times["copy"], "peft": times["peft"]}
    yield against(f"copy {linears} weights of width {size.merge_width}, {name}, and nothing else", copying, None)
    good = {"peftkit": times["peftkit for good"], "peft": times["peft"]}
    yield against(f"{what}, for good (keep_base=False)", good, size.limit(limit))

    weights = [ours_model.get_parameter(f"{n}.weight") for n in names]
    before = [w.detach().clone() for w in weights]
    changed = 0
    for _ in range(3):
        peftkit.merge(ours_model)
        peftkit.unmerge(ours_model)
        changed += sum(not torch.equal(_bits(w), _bits(b)) for w, b in zip(weights, before, strict=True))
    yield Row(f"weights changed by 3 times merge and unmerge, {name}", changed, "weights", 0 if size.promised else None)

    largest = max(w.nbytes for w in weights)
    extra = {"peftkit": peak_scratch(lambda: peftkit.merge(ours_model)), "peft": peak_scratch(wrapped.merge_adapter)}
    yield Row(
        f"peak memory of merging beside the kept copy, {name}",
        extra["peftkit"] / largest,
        "× the largest weight",
        size.limit(0.25),
        {**{f"{k} bytes": v for k, v in extra.items()}, "largest weight bytes": largest},
    )


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8)


def _draw(model: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.02)


def peak_scratch(run: Callable[[], Any]) -> int:
    """The most bytes, by torch's own CPU allocator, that `run` held at one time of what it gave back by its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    steps = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live: dict[int, list[int]] = {}
    freed = [False] * len(steps)
    for i, step in enumerate(steps):
        if step > 0:
            live.setdefault(step, []).append(i)
        elif live.get(-step):
            freed[i] = freed[live[-step].pop()] = True
    held = peak = 0
    for step, counts in zip(steps, freed, strict=True):
        held += step if counts else 0
        peak = max(peak, held)
    return peak
