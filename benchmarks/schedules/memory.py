"""What LISA holds in memory, in a process of its own, on few tokens: `python -m benchmarks.schedules.memory`.

Prints one line of JSON. Each measure has its arms, which differ in the recipe alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from benchmarks.demo.__main__ import CACHE, count
from benchmarks.demo.tasks import Batch
from benchmarks.schedules import gauges
from benchmarks.schedules.one import Training
from benchmarks.schedules.recipes import RECIPES
from benchmarks.schedules.texts import Texts
from peftkit import LISA, stacks

# glibc raises the size from which it maps a block apart whenever one is freed, up to 32 MiB, and what is smaller lies in a
# heap that is returned only from its end. A fixed size, 64 KiB here, has every weight's tensors mapped and returned apart.
ALLOCATORS = {"plain": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}}
TOKENS = 8


@dataclass(frozen=True)
class Measure:
    """One measure: for which recipes it runs, and what it gives for one."""

    run: Callable[[str], dict[str, Any]]
    arms: tuple[str, ...]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules.memory")
    parser.add_argument("--measure", choices=MEASURES, required=True)
    parser.add_argument("--arm", choices=RECIPES, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"measure": options.measure, "arm": options.arm}
    print(json.dumps(found | MEASURES[options.measure].run(options.arm)))


def real() -> nn.Module:
    """The decoder of the benchmark."""
    return Texts(CACHE).load()


def small() -> nn.Module:
    """The Llama for which a size of the state was promised."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        vocab_size=2000,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def started(arm: str, load: Callable[[], nn.Module], interval: int) -> Training:
    """The training of a recipe, with another interval where it has one."""
    recipe = RECIPES[arm]
    if isinstance(recipe.schedule, partial) and recipe.schedule.func is LISA:
        recipe = replace(recipe, schedule=partial(recipe.schedule, interval=interval))
    return Training.of(load(), recipe)


def tokens(step: int) -> Batch:
    """One short text, drawn anew each step."""
    ids = torch.randint(3, 2000, (1, TOKENS), generator=torch.Generator().manual_seed(step))
    return Batch(ids, torch.ones_like(ids), torch.zeros(1))


def peaks(arm: str, load: Callable[[], nn.Module] = real, steps: int = 6) -> dict[str, Any]:
    """The peak of a few steps, with a switch after every second one."""
    training = started(arm, load, interval=2)
    blocks = stacks.find(training.model, None)
    found: dict[str, Any] = {"blocks": len(blocks), "block_parameters": count(blocks[0].module.parameters())}
    gauges.forget_peak()
    found["resident_before"] = gauges.resident()
    for step in range(steps):
        found |= training.step(tokens(step))
    return found | {"peak_bytes": gauges.peak(), "resident_bytes": gauges.resident()}


def switches(arm: str, load: Callable[[], nn.Module] = real, steps: int = 50) -> dict[str, Any]:
    """What is resident after each step, and the most that was until then; LISA switches at every one."""
    training = started(arm, load, interval=1)
    gauges.forget_peak()
    found: dict[str, Any] = {"resident_before": gauges.resident(), "resident": [], "peak": []}
    for step in range(steps):
        found |= training.step(tokens(step))
        found["resident"].append(gauges.resident())
        found["peak"].append(gauges.peak())
    return found


def state(arm: str, load: Callable[[], nn.Module] = small, steps: int = 60) -> dict[str, Any]:
    """The optimizer's state after 60 steps of a small model."""
    training = started(arm, load, interval=5)
    found: dict[str, Any] = {}
    for step in range(steps):
        found = training.step(tokens(step))
    return found


MEASURES = {
    "peaks": Measure(peaks, ("full", "lisa-2")),
    "switches": Measure(switches, ("lisa-2",)),
    "state": Measure(state, ("full", "lisa-2")),
}

if __name__ == "__main__":
    main()
