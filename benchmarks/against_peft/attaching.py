"""What `inject` costs in time and memory; run by itself, the memory alone, in this very process."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import nn

import peftkit

from .common import Row, Size, against, clock, llama, names_of, ours, theirs, timed


def measure(size: Size) -> Iterator[Row]:
    """Time of `inject`, in all the ways that were promised."""
    count = 7 * size.layers
    yield against(f"inject into {count} Linears", _inject(size, "cpu"), size.limit(1 / 7))
    yield against(f"inject into {count} Linears on the meta device", _inject(size, "meta"), size.limit(1 / 7))
    yield against(f"inject with a rank for each of {count} full names", _ranks(size), size.limit(1 / 70))
    yield from _many(size)


def on_fresh_models(
    layers: int, candidates: dict[str, Callable[[nn.Module], Any]], rounds: int, *, device: str = "cpu"
) -> dict[str, float]:
    """Medians, where every call gets a model of its own that is built outside of the timing."""
    fresh: list[nn.Module] = []

    def build() -> None:
        fresh[:] = [llama(layers, device=device)]
        gc.collect()

    def taking(run: Callable[[nn.Module], Any]) -> Callable[[], Any]:
        return lambda: run(fresh[0])

    return timed({name: taking(run) for name, run in candidates.items()}, rounds, build, warmup=int(rounds > 1))


def _inject(size: Size, device: str) -> dict[str, float]:
    return on_fresh_models(
        size.layers,
        {
            "peftkit": lambda model: peftkit.inject(model, ours()),
            "peft": lambda model: peft.get_peft_model(model, theirs()),
        },
        size.rounds,
        device=device,
    )


def _ranks(size: Size) -> dict[str, float]:
    ranks = {name: 2 + i % 7 for i, name in enumerate(names_of(llama(size.layers, device="meta")))}
    return on_fresh_models(
        size.layers,
        {
            "peftkit": lambda model: peftkit.inject(model, ours(ranks)),
            "peft": lambda model: peft.get_peft_model(model, theirs(rank_pattern=ranks)),
        },
        1,  # peft's takes long, and the ratio is large
    )


def one_by_one(attach: Callable[[str], Any], count: int) -> list[float]:
    """Seconds of each of `count` attachments to one model, without the collector."""
    times = []
    gc.collect()
    gc.disable()
    try:
        for i in range(count):
            start = clock()
            attach(f"a{i}")
            times.append(clock() - start)
    finally:
        gc.enable()
    return times


def _many(size: Size) -> Iterator[Row]:
    count, linears = size.adapters, 7 * size.fewer

    def run_ours() -> list[float]:
        model = llama(size.fewer)
        return one_by_one(lambda name: peftkit.inject(model, ours(), name=name), count)

    def run_theirs() -> list[float]:
        model = peft.get_peft_model(llama(size.fewer), theirs(), adapter_name="first")
        return one_by_one(lambda name: model.add_adapter(name, theirs()), count)

    # peft's takes minutes and runs once, between two halves of ours
    runs = [run_ours() for _ in range(3)]
    peft_times = run_theirs()
    runs += [run_ours() for _ in range(3)]
    totals = {"peftkit": statistics.median(map(sum, runs)), "peft": sum(peft_times)}
    yield against(f"inject {count} adapters into {linears} Linears", totals, size.limit(1 / 70, adapters=100))

    few = min(5, count - 1)
    second = statistics.median(t for times in runs for t in times[1 : 1 + few])
    last = statistics.median(t for times in runs for t in times[-few:])
    yield Row(
        f"the last of {count} adapters against the second (medians of {few} neighbours)",
        last / second,
        "× the second",
        size.limit(1.0, adapters=100),
        {"second": second, "last": last, "peft second": peft_times[1], "peft last": peft_times[-1]},
    )


def measure_memory(size: Size) -> Iterator[Row]:
    """What attaching leaves in memory, each time in a process of its own."""
    for how, title in (("tracemalloc", "Python's allocations"), ("rss", "resident memory")):
        found = {}
        for name in ("peftkit", "peft"):
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, how, name, str(size.layers)],
                capture_output=True,
                text=True,
                check=True,
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
        yield Row(
            f"memory left a Linear beside the tensors, {title}",
            found["peftkit"],
            "KiB",
            size.limit(10),
            {f"{name} KiB": value for name, value in found.items()},
        )


def left_behind(how: str, library: str, layers: int) -> float:
    """KiB a Linear that attaching leaves behind, less the bytes of the tensors."""

    def attach(model: nn.Module) -> Any:
        return peftkit.inject(model, ours()) if library == "peftkit" else peft.get_peft_model(model, theirs())

    attach(llama(1))  # what is loaded or cached once is not left behind by each Linear
    model = llama(layers)
    gc.collect()
    if how == "tracemalloc":
        tracemalloc.start()
    before = _now(how)
    kept = attach(model)
    if library == "peftkit":
        kept = None  # the report is the caller's to keep
    gc.collect()
    after = _now(how)
    names = set(names_of(llama(layers, device="meta")))
    tensors = 0 if how == "tracemalloc" else sum(p.nbytes for p in model.parameters() if p.requires_grad)
    del kept
    return (after - before - tensors) / len(names) / 1024


def _now(how: str) -> int:
    if how == "tracemalloc":  # sees no storage of a tensor
        return tracemalloc.get_traced_memory()[0]
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(left_behind(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
