"""Film reviews as a decoder reads them: every token predicted from those before it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.demo.tasks import Batch, SmolLM2
from benchmarks.schedules.recipes import TOKENS


class Texts(SmolLM2):
    """The beginning of each review, and nothing around it."""

    pad_left = False

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self.tokenizer.enable_truncation(TOKENS)

    def load(self) -> nn.Module:
        return in_memory(super().load())

    def prompt(self, text: str) -> str:
        return text


def in_memory(model: nn.Module) -> nn.Module:
    """Copy each weight out of the mapped file, of which a page is resident only once it was read."""
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Nats a token; padding is not predicted."""
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    return model(batch.ids, attention_mask=batch.mask, labels=labels, use_cache=False).loss


@torch.inference_mode()
def held_out_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Nats a token over all batches."""
    total = tokens = 0.0
    for batch in batches:
        predicted = int(batch.mask[:, 1:].sum())
        total += predicted * mean_loss(model, batch).item()
        tokens += predicted
    return total / tokens
