"""One run, in a process of its own: `python -m benchmarks.schedules.one --recipe lisa-2`. Prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

import peftkit
from benchmarks.demo.__main__ import CACHE, count
from benchmarks.demo.data import SDIST, read_reviews, split
from benchmarks.demo.training import in_length_order, in_random_order
from benchmarks.schedules import gauges
from benchmarks.schedules.recipes import BATCH, EVERY, HELD_OUT, RECIPES, STEPS, Recipe
from benchmarks.schedules.texts import Texts, held_out_loss, mean_loss
from peftkit import MeanWeightNorms
from peftkit.schedules.schedule import Schedule, SteppedSchedule

MEASURED_NORMS = ("full", "lora")  # of which LISA's paper takes the ratio


@dataclass
class Training:
    """A model with what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule | None

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> Training:
        """All that is trainable goes to the optimizer; the schedule turns most of it off again."""
        torch.manual_seed(0)
        if recipe.config is not None:
            peftkit.inject(model, recipe.config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
        return cls(model, optimizer, recipe.schedule(model, optimizer) if recipe.schedule is not None else None)

    def step(self, batch: Any) -> dict[str, int]:
        """One step; what it held before the switch, if there is one."""
        mean_loss(self.model, batch).backward()
        gradients = gauges.gradient_bytes(self.model)
        self.optimizer.step()
        held = {
            "trained": count(p for p in self.model.parameters() if p.requires_grad),
            "weight_bytes": gauges.weight_bytes(self.model),
            "gradient_bytes": gradients,
            "state_bytes": gauges.state_bytes(self.optimizer),
        }
        if isinstance(self.schedule, SteppedSchedule):
            self.schedule.step()
        self.optimizer.zero_grad()
        return held


def main() -> None:
    """Train and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules.one")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(options.recipe)))


def run(name: str, steps: int = STEPS, every: int = EVERY) -> dict[str, Any]:
    """The row of one run. Texts and their order are the same for all."""
    task = Texts(CACHE)
    train, held_out = split(read_reviews(CACHE / SDIST), steps * BATCH, HELD_OUT)
    exam = in_length_order(task, held_out, BATCH)
    model = task.load()
    found: dict[str, Any] = {"recipe": name, "trained": 0, "losses": {"0": held_out_loss(model, exam)}}
    if name == "none":
        return found
    training = Training.of(model, RECIPES[name])
    norms = MeanWeightNorms(model) if name in MEASURED_NORMS else None
    found |= {"resident_before": gauges.resident(), "seconds": 0.0, "peak_bytes": 0}
    batches = in_random_order(task, train, BATCH, 0)
    for done in range(every, steps + 1, every):
        gauges.forget_peak()  # of the evaluation
        for batch in islice(batches, every):
            started = time.perf_counter()
            found |= training.step(batch)
            found["seconds"] += time.perf_counter() - started
            if norms is not None:
                norms.update()
        found["peak_bytes"] = max(found["peak_bytes"], gauges.peak())
        found["losses"][str(done)] = held_out_loss(model, exam)
    return found | ({"norms": norms.mean()} if norms is not None else {})


if __name__ == "__main__":
    main()
