"""Plain PyTorch: what a user writes around peftkit, which asks for no trainer of its own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn
from torch.nn import functional as F

import peftkit

from .data import Review, length_bucketed, length_sorted
from .tasks import Batch, Recipe, Task


def progress_display() -> Progress:
    """A line for each stage, with the loss where there is one."""
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )


def watched(batches: Sequence[Batch], progress: Progress, description: str) -> Iterator[Batch]:
    """The batches, with a line on the display that begins when they do."""
    bar = progress.add_task(description, total=len(batches), note="")
    for batch in batches:
        yield batch
        progress.advance(bar)


def in_length_order(task: Task, reviews: Sequence[Review], size: int = 32) -> list[Batch]:
    """All reviews, for reading without training."""
    encoded = task.encode(reviews)
    return [_select(task, reviews, encoded, rows) for rows in length_sorted(list(map(len, encoded)), size)]


def in_random_order(task: Task, reviews: Sequence[Review], size: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch without end."""
    encoded, rng = task.encode(reviews), random.Random(seed)
    lengths = list(map(len, encoded))
    while True:
        for rows in length_bucketed(lengths, size, rng):
            yield _select(task, reviews, encoded, rows)


def fine_tune(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    reviews: Sequence[Review],
    progress: Progress,
    *,
    seed: int,
    groups: Sequence[dict[str, Any]] = (),
) -> None:
    """Train what peftkit attached, for `recipe.steps` steps; `groups` are the optimizer's, where not all learn alike."""
    optimizer = torch.optim.AdamW(list(groups) or peftkit.parameters(model), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=recipe.steps,
        pct_start=0.1,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    bar = progress.add_task("fine-tuning", total=recipe.steps, note="")
    recent: deque[float] = deque(maxlen=16)
    model.train()
    for batch in islice(in_random_order(task, reviews, recipe.batch, seed), recipe.steps):
        loss = F.cross_entropy(task.logits(model, batch), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item())
        progress.update(bar, advance=1, note=f"loss {sum(recent) / len(recent):.3f}")
    model.eval()


@torch.inference_mode()
def all_logits(model: nn.Module, task: Task, batches: Sequence[Batch], progress: Progress, description: str) -> Tensor:
    """`texts 2`, in the order of the batches."""
    return torch.cat([task.logits(model, batch) for batch in watched(batches, progress, description)])


def accuracy(logits: Tensor, batches: Sequence[Batch]) -> float:
    """The share of texts judged as people judge them."""
    labels = torch.cat([batch.labels for batch in batches])
    return (logits.argmax(-1) == labels).double().mean().item()


def _select(task: Task, reviews: Sequence[Review], encoded: Sequence[list[int]], rows: Sequence[int]) -> Batch:
    return task.collate([encoded[row] for row in rows], [reviews[row].label for row in rows])
