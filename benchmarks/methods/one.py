"""One run, in a process of its own: `python -m benchmarks.methods.one --model minilm --method lora --seed 0`.

Prints one line of JSON. The method `none` is the frozen base.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

import peftkit
from benchmarks.demo.__main__ import CACHE, TASKS, count, peak_memory
from benchmarks.demo.data import SDIST, read_reviews, split
from benchmarks.demo.tasks import Task
from benchmarks.demo.training import accuracy, all_logits, fine_tune, in_length_order
from benchmarks.methods.recipes import HEAD_LR, METHODS, RECIPES, SEEDS, config_for
from peftkit.methods.prefix import start_from_tokens


def main() -> None:
    """Train one method and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.one")
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--method", choices=["none", *METHODS], required=True)
    parser.add_argument("--seed", type=int, choices=SEEDS, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(options.model, options.method, options.seed)))


def run(name: str, method: str, seed: int) -> dict[str, Any]:
    """The row of one run. Texts are the same for all; the seed draws the adapter and the order of texts."""
    task, recipe = TASKS[name](), RECIPES[name]
    train, held_out = split(read_reviews(CACHE / SDIST), recipe.train, recipe.held_out)
    exam = in_length_order(task, held_out)
    with Progress(disable=True) as progress:
        model = with_probe(name, task, train)
        found: dict[str, Any] = {"method": method, "seed": seed, "trained": 0}
        if method != "none":
            torch.manual_seed(seed)
            peftkit.inject(model, config_for(method, task.also_train))
            if (opening := METHODS[method].opening) and not task.also_train:
                length = METHODS[method].config.length  # type: ignore[attr-defined]
                start_from_tokens(model, torch.tensor(task.tokenizer.encode(opening).ids[:length]))
            groups = groups_for(model, task, METHODS[method].rate(name))
            found["trained"] = count(groups[0]["params"])
            started = time.perf_counter()
            fine_tune(model, task, recipe, train, progress, seed=seed, groups=groups)
            found["seconds"] = time.perf_counter() - started
        found["accuracy"] = accuracy(all_logits(model, task, exam, progress, "held out"), exam)
    return found | {"peak_bytes": peak_memory()}


def groups_for(model: nn.Module, task: Task, lr: float) -> list[dict[str, Any]]:
    """The adapter at `lr`, and the head at a rate of its own, the same for all methods."""
    whole = [p for m in head(model, task) for p in m.parameters() if p.requires_grad]
    others = {id(p) for p in whole}
    own = [p for p in peftkit.parameters(model) if id(p) not in others]
    return [{"params": own, "lr": lr}, *([{"params": whole, "lr": HEAD_LR}] if whole else [])]


def head(model: nn.Module, task: Task) -> list[nn.Module]:
    """The modules that the task trains whole beside any method."""
    return [model.get_submodule(name) for name in task.also_train]


def with_probe(name: str, task: Task, train: Any) -> nn.Module:
    """The model, with its head solved to convergence on the frozen body: where all methods start."""
    model, kept = task.load(), CACHE / f"probe-{name}.pt"
    if not task.also_train:
        return model
    if not kept.exists():
        task.fit_rival(model, in_length_order(task, train))
        torch.save([m.state_dict() for m in head(model, task)], kept)
    for module, state in zip(head(model, task), torch.load(kept), strict=True):
        module.load_state_dict(state)
    return model


if __name__ == "__main__":
    main()
