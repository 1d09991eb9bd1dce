"""What is trained, and how: one learning rate for everything that trains base weights, and the customary one of LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from benchmarks.methods.recipes import METHODS
from peftkit import LISA, Config, HalfFineTuning
from peftkit.schedules.schedule import Schedule

STEPS, BATCH, TOKENS, HELD_OUT, EVERY = 60, 16, 32, 128, 10
LR = 5e-5  # customary for full fine-tuning of models this small; none was searched for


@dataclass(frozen=True)
class Recipe:
    """One line of the table."""

    title: str
    lr: float = LR
    config: Config | None = None
    schedule: Callable[[nn.Module, Any], Schedule] | None = None


def lisa(active_layers: int) -> Recipe:
    """LISA with so many blocks at a time."""
    blocks = f"{active_layers} block{'s' * (active_layers > 1)}"
    return Recipe(f"LISA, {blocks}", schedule=partial(LISA, active_layers=active_layers, interval=10))


RECIPES = {
    "none": Recipe("frozen base"),
    "full": Recipe("full fine-tuning"),
    "lisa-1": lisa(1),
    "lisa-2": lisa(2),
    "lisa-4": lisa(4),
    "lora": Recipe("LoRA", METHODS["lora"].lr, METHODS["lora"].config),
    "half": Recipe("half fine-tuning", schedule=HalfFineTuning),
}
