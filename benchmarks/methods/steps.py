"""What a training step costs, over one of the frozen base, all on one model and one batch, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

import peftkit
from benchmarks.demo.__main__ import CACHE, TASKS
from benchmarks.demo.data import SDIST, read_reviews, split
from benchmarks.demo.tasks import Batch, Task
from benchmarks.demo.training import in_random_order
from benchmarks.measure import interleaved
from benchmarks.methods.recipes import METHODS, RECIPES


def measure(name: str, methods: Sequence[str], rounds: int = 5) -> dict[str, float]:
    """Forward, backward and AdamW of each method, over forward and backward to the first block's input of the base."""
    torch.set_num_threads(1)
    task, recipe = TASKS[name](), RECIPES[name]
    (train,) = split(read_reviews(CACHE / SDIST), recipe.train)
    (batch,) = islice(in_random_order(task, train, recipe.batch, 0), 1)
    model = task.load()
    for method in methods:
        peftkit.inject(model, METHODS[method].config, name=method)
    turns = {method: _step(model, task, batch, method) for method in methods}
    times = interleaved({"none": _frozen(model, task, batch), **turns}, rounds, warmup=1, clock=time.process_time)
    return {method: times[method] / times["none"] for method in methods}


def _step(model: nn.Module, task: Task, batch: Batch, method: str) -> Callable[[], None]:
    peftkit.activate(model, method)
    optimizer = torch.optim.AdamW(peftkit.parameters(model), lr=1e-5)

    def step() -> None:
        peftkit.activate(model, method)
        F.cross_entropy(task.logits(model, batch), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _frozen(model: nn.Module, task: Task, batch: Batch) -> Callable[[], None]:
    """The base with gradients down to its embeddings, as every method needs them, and none of its weights."""
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))

    def step() -> None:
        handle = embedding.register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
        with peftkit.disabled(model):
            F.cross_entropy(task.logits(model, batch), batch.labels).backward()
        handle.remove()

    return step
